"""The parts of scripts/bench.py: loads, rounds, verdicts, report."""
