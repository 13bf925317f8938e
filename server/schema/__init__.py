"""Requests and responses as pydantic models, with the names of the public OpenAI specification."""
