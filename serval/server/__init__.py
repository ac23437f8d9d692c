"""OpenAI-compatible HTTP server, its metrics and its chat page."""
