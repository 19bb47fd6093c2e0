"""The page at /ui: its files, and the figures that it shows."""
