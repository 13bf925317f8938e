"""HTTP: the OpenAI-compatible API, chat templates, output parsing and the command line."""
