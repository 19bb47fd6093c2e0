"""Fourteen checks of a running gateway, one line each."""
