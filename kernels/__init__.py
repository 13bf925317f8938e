"""The op table and its backends."""
