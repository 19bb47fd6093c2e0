"""A list of prompts that is too long for the engines at once: the caller's body cut into those of
several calls (`bodies.py`), and what engines answer put together as if it had been one: whole
answers (`answers.py`), events (`streams.py`).

Nothing is turned into values that is only passed on: prompts and choices are bytes, cut out where
they lie, and everything beside them stays as its sender wrote it.
"""
