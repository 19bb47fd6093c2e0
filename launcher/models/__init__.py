"""The model: where it lies, its files, its shape, and how it writes."""
