"""Who may come in, how much, and when: keys, limits, the queue, deadlines."""
