"""gemma-serve: an OpenAI-compatible server library for Google's Gemma 3."""

__version__ = "0.1.0"
