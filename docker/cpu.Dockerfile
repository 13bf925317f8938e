# Mixbit on CPUs. Build from the repository's root:
#   docker build -f docker/cpu.Dockerfile -t mixbit:cpu .
# Run, with models kept in a volume (an API key is required beyond loopback):
#   docker run -p 8080:8080 -v mixbit-cache:/cache -e MIXBIT_API_KEY=secret mixbit:cpu --model org/name
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md ./
COPY server server
COPY engine engine
COPY kernels kernels
COPY configs configs
COPY models models
RUN python3 -m venv /opt/mixbit && /opt/mixbit/bin/pip install --no-cache-dir .

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home mixbit && install -d -o mixbit -m 0700 /cache
COPY --from=build /opt/mixbit /opt/mixbit
USER mixbit
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
EXPOSE 8080
ENTRYPOINT ["/opt/mixbit/bin/mixbit", "serve", "--host", "0.0.0.0"]
