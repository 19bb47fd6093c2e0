"""The launcher: owns the engine's process, from the flags it gets to what happens when it dies."""
