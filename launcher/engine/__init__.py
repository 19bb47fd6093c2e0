"""The engine's process: started, watched, brought back, stopped; its log and status."""
