# An image of jepa-audio for GPU or CPU:
#   docker build -t jepa-audio .                          GPU: CUDA is part of the wheels of torch
#   docker build -t jepa-audio --build-arg DEVICE=cpu .   CPU: wheels of torch without CUDA, much smaller
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" jepa-audio \
#     fit --config small/waveform --data.root audio --run_dir runs/first
# The host needs a driver for the CUDA version of torch, and the NVIDIA container toolkit.
# No image was built so far: no base image could be pulled. Instead, the installation below was run
# for the GPU (DEVICE=gpu, without --compile-bytecode) in a clean virtual environment of Python 3.11, from
# a folder with only the copied files; `jepa-audio configs` ran there. The wheels for DEVICE=cpu could not be
# reached, so that variant was not run. The step that installs the compilers was not run either.
FROM python:3.12-slim

ARG DEVICE=gpu
# Optional dependencies, for example onnx,hf,finetune,scenes.
ARG EXTRAS=hf

# `--model.compile true` builds kernels with a C and a C++ compiler, on GPUs and CPUs; the base image has none.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv
WORKDIR /opt/jepa-audio
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE requirements.lock ./
COPY src src
COPY configs configs
# The versions are those of the lock file; a package that is not needed here is not installed.
RUN if [ "$DEVICE" = cpu ]; then backend="--torch-backend cpu"; fi; \
    uv pip install --system --no-cache --compile-bytecode --constraints requirements.lock $backend ".[$EXTRAS]"

# The compiled loops of masks, and folders of users without a name in the image.
ENV NUMBA_CACHE_DIR=/tmp/numba HOME=/tmp
WORKDIR /work
ENTRYPOINT ["jepa-audio"]
CMD ["--help"]
