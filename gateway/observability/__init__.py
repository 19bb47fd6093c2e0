"""What operators see: metrics, logs, traces. Every other room may use it; it uses none of them."""
