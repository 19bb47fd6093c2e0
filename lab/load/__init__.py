"""A soak, mixed traffic and faults with every answer checked; and ordinary callers under attack."""
