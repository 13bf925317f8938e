"""Our own kernels for Metal and CUDA, one launch where stock MLX needs many."""
