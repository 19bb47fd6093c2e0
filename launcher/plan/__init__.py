"""Profile + GPU + model -> the command that starts the engine, each option with its reason."""
