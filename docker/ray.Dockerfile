# Ray with torch and vLLM: head, workers, training and serving.
#   docker build -f docker/ray.Dockerfile --build-arg HARDWARE=cpu -t raydpo-ray:0.1.0-cpu .
#   docker build -f docker/ray.Dockerfile --build-arg HARDWARE=gpu -t raydpo-ray:0.1.0-gpu .
ARG HARDWARE=cpu

FROM python:3.11-slim-bookworm AS base
# g++: torch and triton compile kernels as they run. libnuma1: vLLM's CPU build.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/*

FROM base AS cpu
# torch's CPU builds. With a GPU this index must not be asked: pip would take its `+cpu` for the newer version.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

FROM base AS gpu
# What the container may use of the driver; which GPUs it sees is Kubernetes' affair.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${HARDWARE}
ARG HARDWARE
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Into the system's Python, whose programs a login shell finds as well.
COPY requirements/${HARDWARE}.txt requirements/
RUN pip install --no-deps --requirement requirements/${HARDWARE}.txt
COPY pyproject.toml README.md LICENSE ./
COPY dpo_core dpo_core
COPY services services
RUN pip install --no-deps . \
 && useradd --uid 1000 --create-home ray
ENV PYTHONUNBUFFERED=1 DO_NOT_TRACK=1 RAY_USAGE_STATS_ENABLED=0
# A node that was cut off is noticed in a minute: docs/operate/reliability.md.
ENV RAY_grpc_client_keepalive_time_ms=20000 RAY_grpc_client_keepalive_timeout_ms=20000 \
    RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=3
# By number: Kubernetes checks it for runAsNonRoot.
USER 1000
WORKDIR /home/ray
CMD ["ray", "--help"]
