# vLLM under the launcher, in two forms:
#
#   engine   vLLM and the launcher: what compose.yaml starts
#   course   (the default) engine, gateway and a model in ONE container that answers on port 8000:
#            docker build -f Dockerfile.engine -t course . && docker run --gpus all -p 8000:8000 course
#
# `--build-arg DEVICE=cpu` makes either of them for a machine without a GPU.
# No `# syntax=` line: what is used here is in every BuildKit, and that image would be one more download.

# gpu or cpu: which of the two stages below the engine stands on.
ARG DEVICE=gpu
ARG VLLM_IMAGE=vllm/vllm-openai
# For CUDA 13, driver 580 or newer; v0.32.0-cu129 runs on the drivers of CUDA 12.
ARG VLLM_TAG=v0.32.0
ARG PYTHON_TAG=3.12-slim

# --- what the engine stands on ---

FROM ${VLLM_IMAGE}:${VLLM_TAG} AS gpu

FROM python:${PYTHON_TAG} AS cpu
# Mirrors of PyPI and of PyTorch's CPU index, where they are nearer; the hashes are the same everywhere.
ARG PIP_INDEX_URL
ARG TORCH_INDEX_URL
# The CPU build's one library that a slim image lacks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements/torch-cpu.txt requirements/cpu.txt requirements/
COPY scripts/setup.py scripts/
RUN PIP_NO_CACHE_DIR=1 python3 scripts/setup.py --engine cpu --venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# hadolint ignore=DL3006
FROM ${DEVICE} AS base
ARG PIP_INDEX_URL
WORKDIR /app
# What is lacking, the user, and below them the model: a change of the programs then costs no download.
COPY pyproject.toml ./
COPY requirements/image.txt requirements/
COPY scripts/image.py scripts/
RUN python3 scripts/image.py packages requirements/image.txt
# Whatever vLLM, Triton, FlashInfer and torch compile or log goes below HOME, which is a volume.
RUN groupadd --gid 10001 engine \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin engine \
    && install -d -o 10001 -g 10001 /cache /models
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    XDG_STATE_HOME=/cache/state \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
COPY demo demo

# --- a model, for the course ---

FROM base AS model
# A hub's name, `demo` for the shipped one, or empty: then mount a model at /models.
ARG MODEL=Qwen/Qwen3-0.6B
# huggingface (HF_ENDPOINT names a mirror) or modelscope
ARG HUB=huggingface
ARG HF_ENDPOINT
COPY launcher/__init__.py launcher/models/files.py launcher/
USER 10001:10001
# A model that needs a token: --secret id=hf_token,src=FILE; it leaves no trace in the image.
RUN --mount=type=secret,id=hf_token,mode=0444 \
    python3 scripts/image.py model "$MODEL" /models --hub "$HUB"

# --- engine ---

FROM base AS engine
LABEL org.opencontainers.image.title="vllm-gateway-engine" \
      org.opencontainers.image.description="vLLM under a launcher that tunes, watches and restarts it"
ENV LAUNCHER_ENGINE_HOST=0.0.0.0 \
    LAUNCHER_ENGINE_PORT=8001 \
    LAUNCHER_STATUS_PORT=8002
COPY launcher launcher
COPY scripts/health.py scripts/
RUN python3 -m compileall -q launcher
USER 10001:10001
VOLUME /cache
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
# The launcher's own word: 200 once the engine has really produced a token.
HEALTHCHECK --interval=5s --timeout=5s --retries=6 --start-period=900s \
    CMD ["python3", "-I", "-S", "scripts/health.py", "http://127.0.0.1:${LAUNCHER_STATUS_PORT}/readyz"]
# vLLM's image would start vLLM; here the launcher does.
ENTRYPOINT ["python3", "-m", "launcher"]
CMD ["serve"]

# --- course ---

FROM engine AS course
LABEL org.opencontainers.image.title="vllm-gateway-course" \
      org.opencontainers.image.description="Engine, gateway and model in one container"
ARG MODEL=Qwen/Qwen3-0.6B
COPY --from=model --chown=10001:10001 /models /models
COPY --chown=0:0 gateway gateway
# The judge has no key, so nobody needs one: publish the port only where that is right.
ENV LAUNCHER_MODEL=/models/${MODEL} \
    LAUNCHER_HOST=0.0.0.0 \
    LAUNCHER_PORT=8000 \
    LAUNCHER_ENGINE_HOST=127.0.0.1 \
    GATEWAY_ALLOW_ANONYMOUS=true \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --retries=6 --start-period=900s \
    CMD ["python3", "-I", "-S", "scripts/health.py", "http://127.0.0.1:${LAUNCHER_PORT}/readyz"]
CMD ["up"]
