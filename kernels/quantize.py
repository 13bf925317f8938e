"""Quantizing and dequantizing outside of a program: what conversion needs, as the reference defines it."""

from mixbit.kernels.reference.matrix import dequantize
from mixbit.kernels.reference.quantize import quantize

__all__ = ["dequantize", "quantize"]
