"""Which flags `vllm serve` knows: recorded ones, changes, and what the installed one says."""
