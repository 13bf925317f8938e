# Mixbit on NVIDIA GPUs, through MLX's CUDA build. Build from the repository's root:
#   docker build -f docker/cuda.Dockerfile -t mixbit:cuda .
#   docker run --gpus all -p 8080:8080 -v mixbit-cache:/cache -e MIXBIT_API_KEY=secret mixbit:cuda --model org/name
# The development image is kept at run time: MLX compiles kernels against the CUDA headers.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ ca-certificates \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md ./
COPY server server
COPY engine engine
COPY kernels kernels
COPY configs configs
COPY models models
RUN python3 -m venv /opt/mixbit && /opt/mixbit/bin/pip install --no-cache-dir '.[cuda]' \
    && useradd --create-home mixbit && install -d -o mixbit -m 0700 /cache
USER mixbit
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface CUDA_HOME=/usr/local/cuda
EXPOSE 8080
ENTRYPOINT ["/opt/mixbit/bin/mixbit", "serve", "--host", "0.0.0.0"]
