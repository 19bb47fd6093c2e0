"""The parts of the self-test (`scripts/selftest.py`): one room a file."""
