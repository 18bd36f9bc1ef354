# By digest, which a registry cannot change. deploy/README.md tells how to take a newer one.
ARG PYTHON=3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

FROM python:${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv --without-pip /venv && mkdir -m 700 /data
COPY requirements.lock ./
RUN pip --python /venv/bin/python install --no-deps --require-hashes -r requirements.lock
COPY requirements-build.lock ./
RUN pip install --no-deps --require-hashes -r requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheel . \
 && pip --python /venv/bin/python install --no-index --no-deps /wheel/*.whl \
 && pip --python /venv/bin/python check

FROM python:${PYTHON}
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip
COPY --from=build /venv /venv
COPY --from=build --chown=10001:10001 /data /data
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DARKROOM_HOST=0.0.0.0 DARKROOM_DATA_DIR=/data
# A number, so that a cluster can see that it is not root.
USER 10001:10001
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8080
# Not urllib: that would ask a proxy if one is set.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('DARKROOM_PORT') or 8080), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["darkroom"]
CMD ["serve"]
