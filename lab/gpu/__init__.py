"""Engines side by side on one host's GPUs: all stopped but the one that is measured."""
