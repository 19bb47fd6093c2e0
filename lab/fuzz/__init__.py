"""Hostile requests by the hundred thousand, and what a gateway and its engine make of them."""
