"""What the programs say on a command line, beside what they do."""
