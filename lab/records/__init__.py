"""Records of runs: figures with what made them, and docs/results.md made of those kept."""
