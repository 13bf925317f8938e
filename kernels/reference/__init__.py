"""The op table in NumPy: slow, and the definition of every op."""
