"""The gateway: the HTTP face over one or several vLLM engines."""
