# Nodes of Ray that generate, score, train and evaluate: all that there is. vLLM and torch for CPUs, or for NVIDIA's GPUs.
#
#   docker build --file docker/inference.Dockerfile --tag prefsieve-inference:0.1.0-cpu .
#   docker build --file docker/inference.Dockerfile --tag prefsieve-inference:0.1.0-gpu --build-arg DEVICE=gpu .

FROM python:3.11.14-slim-bookworm AS uv
RUN pip install --no-cache-dir uv==0.13.8

FROM python:3.11.14-slim-bookworm AS wheel
COPY --from=uv /usr/local/bin/uv /usr/local/bin/
COPY pyproject.toml README.md /src/
COPY flows /src/flows
COPY tasks /src/tasks
RUN --mount=type=secret,id=uv,target=/etc/uv/uv.toml uv build --wheel --out-dir /wheel /src

# As in the control image up to the next comment, so that they share the layers.
FROM python:3.11.14-slim-bookworm
RUN useradd --uid 1000 --create-home prefsieve \
    && install --directory --owner=1000 --group=1000 /models /workspace
ENV VIRTUAL_ENV=/opt/prefsieve UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1
WORKDIR /opt/pins
COPY pyproject.toml constraints.txt ./
RUN --mount=type=bind,from=uv,source=/usr/local/bin,target=/uv \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    /uv/uv venv /opt/prefsieve \
    && /uv/uv pip install --constraints constraints.txt --requirements pyproject.toml
# g++: torch and Triton compile at run time. libgomp1: torch. libnuma1: vLLM on CPUs. wget: probes.
# Debian keeps one version of a package: a pinned one is gone after its next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libgomp1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*
ARG DEVICE=cpu
# For GPUs torch's default, the CUDA build that vLLM is made for; else PyTorch's build for CPUs.
RUN --mount=type=bind,from=uv,source=/usr/local/bin,target=/uv \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    if [ "$DEVICE" = cpu ] && [ ! -s /etc/uv/uv.toml ]; then export UV_TORCH_BACKEND=cpu; fi \
    && /uv/uv pip install --constraints constraints.txt --requirements pyproject.toml --extra training
RUN --mount=type=bind,from=uv,source=/usr/local/bin,target=/uv \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    if [ "$DEVICE" = cpu ] && [ ! -s /etc/uv/uv.toml ]; then export UV_TORCH_BACKEND=cpu; fi \
    && /uv/uv pip install --constraints constraints.txt --requirements pyproject.toml --extra "$DEVICE"
# The code comes last: of an image that was fetched before, a change fetches this layer only.
COPY --from=wheel /wheel/ ./
RUN --mount=type=bind,from=uv,source=/usr/local/bin,target=/uv \
    /uv/uv pip install --no-deps --offline ./*.whl

ENV PATH=/opt/prefsieve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models \
    DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1
# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /workspace
CMD ["ray", "start", "--head", "--block", "--dashboard-host=0.0.0.0"]
# Ray's agent answers for its node, and on a head for the cluster, without a token. `ray health-check` only asks the head,
# and takes seconds of CPU.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["wget", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:52365/api/healthz"]
