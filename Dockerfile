# kvtrain with its server, adapters and launchers, for CPUs and for NVIDIA GPUs.
#
#   docker build --tag kvtrain:cuda .
#   docker build --build-arg TORCH_INDEX_URL=... --tag kvtrain:cpu .     # PyTorch's index of CPU wheels
#   docker run --rm --gpus all --volume "$PWD":/data --workdir /data kvtrain:cuda kvtrain fit --config RECIPE
#
# The image has a C compiler, which Triton needs where it compiles kernels.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-bookworm

# Which build of torch: the package index's own, which on Linux brings CUDA along, or that of another index.
ARG TORCH_INDEX_URL=
# What else of pyproject.toml's extras; `serve,lora,deepspeed` for launch/deepspeed.sh.
ARG EXTRAS=serve,lora

ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

WORKDIR /workspace

# torch comes first and by itself: nothing of ours changes it, and this layer is the large one.
COPY constraints.txt ./
RUN grep '^torch==' constraints.txt > torch.txt \
    && python -m pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt

COPY pyproject.toml README.md LICENSE kvtrain_cli.py ./
COPY kvtrain kvtrain
COPY recipes recipes
COPY configs configs
COPY launch launch
RUN grep -vE '^(torch|triton)==' constraints.txt > without-torch.txt \
    && python -m pip install -c without-torch.txt ".[$EXTRAS]" \
    && rm torch.txt without-torch.txt \
    && kvtrain --version

# Nobody's home, where models of the Hub and tokenised text are kept; mount a volume here to keep them.
ENV HOME=/home/kvtrain USER=kvtrain
RUN mkdir -p "$HOME" && chmod 1777 "$HOME" /workspace
USER 1000:1000

EXPOSE 8000
CMD ["kvtrain", "--help"]
