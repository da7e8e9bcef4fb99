# Training on GPUs: PyTorch, Transformer Engine and apex of NVIDIA's image, and what megatron-msa needs besides.
#
#   docker build -t megatron-msa .
#   docker run --rm --gpus all megatron-msa python docker/smoke_test.py --with-te    # with the Triton kernels
#
# For training add --ipc=host: the loaders of data and the process that saves share memory with the one that trains, far
# more than the 64 MB that Docker gives.
#
# Python 3.12 and a pre-release of PyTorch 2.11, built together with everything that is compiled against it.
FROM nvcr.io/nvidia/pytorch:26.03-py3

WORKDIR /opt/megatron-msa
COPY docker/requirements.txt docker/install.sh docker/
RUN docker/install.sh

COPY --chown=1001:1001 . .
# The requirements are there: pip would refuse a pre-release of PyTorch, and build in an environment without it.
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 1001 msa \
    && chown 1001:1001 .

USER 1001
RUN python docker/smoke_test.py --with-te
