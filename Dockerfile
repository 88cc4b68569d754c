# docker build --target evaluate -t metilr .                       any command; for the CPU
# docker build --target serve -t metilr-serve .                    the page, with a health check
# docker build --target evaluate --build-arg BUILD=cuda -t metilr:cuda .
# docs/containers.md says how they are run.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS evaluate
ARG BUILD=cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# What metilr needs, in a layer of its own: a change of the code does not install it again.
WORKDIR /metilr
COPY pyproject.toml .ci/requirements ./
RUN python requirements "$BUILD" demo,serve,openvino,heic,milvus > /tmp/all.txt; \
    if [ "$BUILD" = cpu ]; then \
      grep -E '^torch(vision)?>' /tmp/all.txt > /tmp/torch.txt; \
      pip install --no-cache-dir -r /tmp/torch.txt --index-url https://download.pytorch.org/whl/cpu; \
    fi; \
    pip install --no-cache-dir -r /tmp/all.txt; \
    rm -f /tmp/all.txt /tmp/torch.txt
COPY README.md LICENSE ./
COPY metilr metilr
# Whoever runs it (docker run -u) can write caches into the home; they end with the container.
RUN useradd --uid 1000 --create-home metilr && chmod 1777 /home/metilr \
    && pip install --no-cache-dir --no-deps . && rm -rf /metilr/*
ENV HOME=/home/metilr
WORKDIR /home/metilr
USER 1000:1000
ENTRYPOINT ["metilr"]
CMD ["--help"]

FROM evaluate AS serve
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=9)"]
ENTRYPOINT ["metilr", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
