# The image for searches and for the dashboard: see docker-compose.yml. For a GPU, start it with `--gpus all`, or with a device
# reservation in compose: the torch wheel includes CUDA.
FROM python:3.12-slim
RUN pip install --no-cache-dir uv && useradd --create-home hpo
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY hpo hpo
COPY storage storage
COPY search_spaces search_spaces
RUN uv sync --no-dev --no-cache && mkdir -p runs data && chown -R hpo:hpo runs data
USER hpo
ENV PATH=/app/.venv/bin:$PATH
ENTRYPOINT ["hpo"]
