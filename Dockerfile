# CPU image: docker build -t distill . && docker run --rm -v "$PWD:/work" distill run quickstart
FROM python:3.11-slim

# what matplotlib, tokenizers and torch need is in the wheels; git shows a revision in reports
RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY distill distill
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[onnx]' \
    && useradd --create-home distill

USER distill
WORKDIR /work
ENTRYPOINT ["distill"]
CMD ["--help"]
