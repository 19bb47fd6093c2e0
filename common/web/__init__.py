"""What both programs' servers ask of a request before they look at what it wants."""
