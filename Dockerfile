# docker build -t vflan . && docker run --rm -p 8888:8888 vflan        (with GPUs: docker run --gpus all ...)
# The same Makefile and requirements.lock as everywhere; JupyterLab prints the address to open.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home vflan
WORKDIR /vflan
RUN chown vflan /vflan
USER vflan
COPY --chown=vflan . .
RUN make setup
EXPOSE 8888
CMD [".venv/bin/python", "-m", "jupyterlab", "notebooks", "--ip=0.0.0.0", "--no-browser"]
