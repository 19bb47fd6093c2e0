"""What is fastest on this host: candidates, measured in turn, and the choice."""
