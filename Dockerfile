# Build stage: the Makefile's own step `make wheel`. The image names its machine: x86-64-v3 is Intel Haswell, AMD Zen or
# newer; for another machine `docker build --build-arg MARCH=...` (empty: what the compiler takes by default).
FROM python:3.11-slim-bookworm AS build
# Not pinned: the base image's own release decides; gcc is not in the final image.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Makefile MANIFEST.in README.md pyproject.toml setup.py ./
COPY cext cext
COPY sglfast sglfast
ARG MARCH=-march=x86-64-v3
RUN SGLFAST_CFLAGS="${MARCH}" make wheel
RUN python -m venv /opt/sglfast \
 && /opt/sglfast/bin/pip install --no-cache-dir "$(echo dist/sglfast-*.whl)[modelexpress-redis]"

# Run stage: no compiler, no sources, no root.
FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home sglfast
COPY --from=build /opt/sglfast /opt/sglfast
ENV PATH=/opt/sglfast/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 30000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:30000/healthz', timeout=2)"]
ENTRYPOINT ["sglfast"]
CMD ["serve", "--host", "0.0.0.0"]
