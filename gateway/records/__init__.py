"""What was used and what was asked, kept over restarts: usage, budgets, audit."""
