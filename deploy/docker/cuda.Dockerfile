# k2dist for machines with NVIDIA GPUs. CUDA, cuDNN and NCCL come with PyTorch's wheels; the driver comes from the host,
# by NVIDIA's container toolkit.
#   docker build -f deploy/docker/cuda.Dockerfile -t k2dist:0.1.0-cuda .

FROM python:3.11.14-slim-bookworm AS builder
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The release pins Debian's packages: within Debian 12 a version changes for security only, and then it has to.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/docker/constraints.txt deploy/docker/
RUN pip install --no-cache-dir --constraint deploy/docker/constraints.txt setuptools
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.py ./
COPY kernels kernels
COPY k2dist k2dist
# Without its native library the wheel works too, slowly: that must not pass unseen.
RUN pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels . \
 && python -m zipfile --list /wheels/k2dist-*.whl | grep --quiet libk2native.so

FROM python:3.11.14-slim-bookworm
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# wget: KubeRay's probes. tini: reaps what Ray leaves behind, and hands signals on. gcc: Triton compiles the stubs that
# launch its kernels on the machine. ibverbs: NCCL's way to InfiniBand and RoCE adapters.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
    gcc ibverbs-providers libc6-dev libibverbs1 librdmacm1 tini wget \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 k2dist \
 && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash k2dist
# A layer that a new k2dist leaves alone. PyTorch's own metadata pins CUDA's libraries and Triton.
COPY deploy/docker/constraints.txt /etc/k2dist/constraints.txt
RUN pip install --no-cache-dir --requirement /etc/k2dist/constraints.txt "triton>=3.6,<4"
RUN --mount=type=bind,from=builder,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl \
 && pip check \
 && k2dist --help > /dev/null

USER 10001:10001
WORKDIR /home/k2dist
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000 50051
# Steps advance where there is work, and the coordinator answers. An hour to load before it counts. Kubernetes has
# probes of its own and ignores this.
HEALTHCHECK --interval=10s --timeout=7s --start-period=3600s --retries=3 \
    CMD ["wget", "--quiet", "--tries=1", "--timeout=6", "--output-document=/dev/null", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["tini", "--"]
# There is no configuration in this image: it is the cluster's (deploy/kuberay), or mount one, with the keys that it names
# (service.api_keys); --insecure would do without.
CMD ["k2dist", "serve", "/etc/k2dist/cluster.yaml", "--grpc", "0.0.0.0:50051", "--http", "0.0.0.0:8000"]
