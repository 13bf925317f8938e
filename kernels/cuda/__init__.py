"""The op table on NVIDIA GPUs, without MLX: kernels compiled at run time, steps replayed as CUDA graphs."""
