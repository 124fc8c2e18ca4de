# The image of pixelclip for all components, serving and the command line. `make image` builds it; see docs/docker.md.
#
# Separate build stages fetch all packages, so the image does not reveal the package index. Its three layers change at different
# rates: torch with CUDA, the other packages, pixelclip.
ARG BASE=python:3.11-slim

FROM ${BASE} AS tools
ARG UV=0.13.9
# A package index instead of the public one.
ARG INDEX_URL=
ENV PIP_INDEX_URL=${INDEX_URL} UV_DEFAULT_INDEX=${INDEX_URL} UV_NO_CACHE=1 UV_LINK_MODE=copy
# --prefix installs packages into /layer, which is then copied over this environment in the image.
ENV INTO="--python /opt/pixelclip/bin/python --prefix /layer --no-deps --compile-bytecode --quiet"
# Keep bytecode valid when a copy changes modification times.
ENV PYC_INVALIDATION_MODE=UNCHECKED_HASH
RUN pip install --quiet --no-cache-dir --root-user-action=ignore "uv==${UV}" \
    && python3 -m venv /opt/pixelclip

FROM tools AS pins
# The pins of requirements.txt without the extras `search`, `app`, `onnx`, `docs`, `dev` and `services`.
ARG EXTRAS="--extra train --extra pipeline --extra data --extra s3"
WORKDIR /pins
COPY requirements.txt pyproject.toml ./
RUN compile="uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --constraints requirements.txt" \
    && printf "torch\ntorchvision\n" | $compile - -o torch.txt \
    && $compile pyproject.toml $EXTRAS -o all.txt \
    && grep -vxFf torch.txt all.txt >others.txt

FROM tools AS torch
COPY --from=pins /pins/torch.txt /pins/
RUN uv pip install $INTO -r /pins/torch.txt

FROM tools AS others
COPY --from=pins /pins/others.txt /pins/
RUN uv pip install $INTO -r /pins/others.txt

FROM tools AS code
WORKDIR /source
COPY pyproject.toml setup.py requirements.txt README.md LICENSE ./
COPY src src
COPY components components
COPY pipelines pipelines
RUN uv pip install $INTO --build-constraints requirements.txt .

FROM ${BASE}
# DVC resolves revisions with git, also in mounted repositories of a different owner.
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends git >/dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
    && git config --system --add safe.directory '*' \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pixelclip \
    && install -d -m 1777 /work
COPY --from=tools /opt/pixelclip /opt/pixelclip
COPY --from=torch /layer /opt/pixelclip
COPY --from=others /layer /opt/pixelclip
COPY --from=code /layer /opt/pixelclip
# Caches and temporary files go to /tmp, the only folder that must be writable. USER names UIDs that have no name.
# MLflow's own commands fetch files through MLflow's server, as pixelclip does. Docker or Kubernetes sets NVIDIA_VISIBLE_DEVICES.
ENV PATH=/opt/pixelclip/bin:$PATH \
    HOME=/tmp \
    USER=pixelclip \
    MPLCONFIGDIR=/tmp/matplotlib \
    DVC_SITE_CACHE_DIR=/tmp/dvc \
    MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD=false \
    MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=false \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    OMP_WAIT_POLICY=PASSIVE
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["pixelclip"]
CMD ["--help"]
ARG VERSION=unknown
ARG PIXELCLIP_REVISION=unknown
ENV PIXELCLIP_REVISION=${PIXELCLIP_REVISION}
LABEL org.opencontainers.image.title=pixelclip \
      org.opencontainers.image.description="Teach CLIP where things are, from images that nobody labelled" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${PIXELCLIP_REVISION}
