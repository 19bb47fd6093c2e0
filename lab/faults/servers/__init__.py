"""Real servers that a gateway leans on, on ports of the loopback, each to be hurt while it runs."""
