"""What callers can ask for: one handler a file. Handlers do not know one another."""
