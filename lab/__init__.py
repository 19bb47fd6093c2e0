"""Measures and judges a running service, and is never needed to run one: `python -m lab --help`.

What is here: the grade, the bench, the self-test, the soak, the records of runs and their reports.
What is not: set-up, lock files and generators (scripts/), the two programs themselves.
"""
