# The two commands of the README in a container, on a CPU:
#
#     docker build --tag diffusionlm .
#     docker run --rm --init --tty --volume "$PWD/runs:/root/diffusionlm/runs" diffusionlm
#
# The run directory is on the host, so the second command resumes a run that was stopped. Other verbs go after the name
# of the image: docker run --rm --tty diffusionlm diffusionlm experiments. tpu_scripts/Dockerfile is the image for pods.

FROM python:3.12.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /root/diffusionlm
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY diffusionlm ./diffusionlm
COPY experiments ./experiments
RUN pip install -e .

CMD ["diffusionlm", "train", "demo"]
