"""Base models: loading, adapters, prompts, and what their attention can do."""
