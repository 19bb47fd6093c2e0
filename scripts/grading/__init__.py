"""The parts of the grader (`scripts/grade.py`): one room a file."""
