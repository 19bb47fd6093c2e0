"""A list of prompts over the engines: cut, fed as places come free, put together; each once."""
