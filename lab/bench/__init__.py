"""What the gateway costs over the engine itself: loads, rounds, verdicts."""
