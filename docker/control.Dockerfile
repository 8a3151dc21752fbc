# The control plane: Prefect's server and worker, the command line, and runs of Prefect, which hand themselves to Ray.
# No torch, no engine, no compiler.
#
#   docker build --file docker/control.Dockerfile --tag prefsieve-control:0.1.0 .

FROM python:3.11.14-slim-bookworm AS uv
RUN pip install --no-cache-dir uv==0.13.8

FROM python:3.11.14-slim-bookworm AS wheel
COPY --from=uv /usr/local/bin/uv /usr/local/bin/
COPY pyproject.toml README.md /src/
COPY flows /src/flows
COPY tasks /src/tasks
RUN --mount=type=secret,id=uv,target=/etc/uv/uv.toml uv build --wheel --out-dir /wheel /src

# Up to the layer with Python's packages as in the other images, so that they share it.
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
# The code comes last: of an image that was fetched before, a change fetches this layer only.
COPY --from=wheel /wheel/ ./
RUN --mount=type=bind,from=uv,source=/usr/local/bin,target=/uv \
    /uv/uv pip install --no-deps --offline ./*.whl

ENV PATH=/opt/prefsieve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models \
    DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_UI_STATIC_DIRECTORY=/home/prefsieve/ui \
    RAY_USAGE_STATS_ENABLED=0
# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /workspace
CMD ["prefect", "worker", "start", "--pool", "prefsieve", "--type", "process", "--with-healthcheck"]
# Of a worker: it has asked for runs lately. Whoever runs something else in this image says how that is healthy.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=8)"]
