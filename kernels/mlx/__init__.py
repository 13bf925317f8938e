"""The op table on MLX: Metal, CUDA, or MLX's own CPU device."""
