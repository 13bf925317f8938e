"""Layers that the model files assemble."""
