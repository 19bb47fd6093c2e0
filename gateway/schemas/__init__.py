"""Every JSON and SSE shape that crosses the border, by who speaks. Nothing here does I/O."""
