# The control plane. Neither torch nor ray is in it.
#   docker build -f docker/control-plane.Dockerfile -t raydpo-control-plane:0.1.0 .
FROM node:22-bookworm-slim AS page
WORKDIR /src/page
COPY page/package.json page/package-lock.json page/.npmrc ./
RUN npm ci
COPY page ./
RUN npm run build

FROM python:3.11-slim-bookworm AS build
ENV PATH=/opt/raydpo/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/raydpo
WORKDIR /src
COPY requirements/control-plane.txt requirements/
RUN pip install --no-deps --requirement requirements/control-plane.txt
COPY pyproject.toml README.md LICENSE ./
COPY dpo_core dpo_core
COPY services services
COPY --from=page /src/services/control_plane/page/built services/control_plane/page/built
RUN pip install --no-deps .

FROM python:3.11-slim-bookworm
COPY --from=build /opt/raydpo /opt/raydpo
ENV PATH=/opt/raydpo/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --create-home raydpo
# By number: Kubernetes checks it for runAsNonRoot.
USER 1000
WORKDIR /home/raydpo
EXPOSE 8000
ENTRYPOINT ["raydpo"]
CMD ["--help"]
