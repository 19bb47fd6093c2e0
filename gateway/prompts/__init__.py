"""From a question to what the engine is sent: prompt styles, chat templates, token ids."""
