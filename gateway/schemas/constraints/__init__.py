"""Constraints of an answer's form, and what they may cost the engine."""
