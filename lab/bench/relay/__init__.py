"""The gateway beside a plain relay and an engine that answers at once."""
