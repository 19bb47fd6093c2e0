"""A soak: mixed traffic and faults against a running gateway, every answer checked."""
