"""Checkpoints that ship with Mixbit, each in a directory of its name. See mixbit.engine.shipped."""
