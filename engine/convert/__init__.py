"""Makes MLX checkpoints: imports GGUF losslessly, quantizes and requantizes safetensors directories."""
