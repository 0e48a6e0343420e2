# docker build -t gemma-serve .
# docker build -t gemma-serve --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .   (no GPU: 3 GB smaller)
# docker run --rm --shm-size 2g -p 127.0.0.1:8000:8000 gemma-serve          (with GPUs: --gpus all)
FROM python:3.12-slim

ARG TORCH_INDEX=""

# Ray runs `ps` to look after its processes. Triton builds a small C extension on a GPU, and our own
# kernels for CPUs are C++; without compilers either is slower.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home gemma
WORKDIR /app

# The large layers first: they change only with the pins.
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
COPY pyproject.toml README.md LICENSE ./
COPY gemma_serve/ gemma_serve/
RUN pip install --no-cache-dir --constraint constraints.txt '.[demo]'

COPY serve_app.py serve_config.yaml ./
COPY config/ config/
COPY deployments/ deployments/
COPY deploy/container.yaml deploy/

# Converted and downloaded weights; mount a volume here to keep them.
RUN mkdir --parents /home/gemma/.cache && chown gemma:gemma /home/gemma/.cache
VOLUME /home/gemma/.cache
USER gemma
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
EXPOSE 8000

# The model may load for many minutes; until then /health is a 503.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]

ENTRYPOINT ["python", "-m", "deployments.launch"]
CMD ["deploy/container.yaml"]
