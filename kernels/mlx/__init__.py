"""The op table on MLX: Metal, CUDA, or MLX's own CPU device."""

import os

# MLX rounds the operands of float32 products to TF32 where the hardware can, unless this says no before its first
# product: logits in float32 were off by 0.006 of their deviation on an H100, not by 0.0004.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
