#!/usr/bin/env bash
# Resolves requirements/*.txt anew from pyproject.toml, for every Python it supports, with hashes.
# usage: lock.sh UV      (`make lock`)
set -euo pipefail
cd "$(dirname "$0")/.."
lock() {
  "$1" pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
    --no-header --quiet "${@:3}" --output-file "requirements/$2.txt"
}
lock "$1" gateway
lock "$1" cpu --extra cpu --constraint requirements/gateway.txt --config-file requirements/cpu.toml \
  --no-emit-package torch --no-emit-package torchaudio --no-emit-package torchcodec \
  --no-emit-package torchvision
lock "$1" dev --extra dev --extra otel --constraint requirements/cpu.txt
# The gateway alone, with spans.
lock "$1" otel --extra otel --constraint requirements/dev.txt
# The CUDA environment gets the same test tools, so it must agree with them.
lock "$1" cuda --extra cuda --constraint requirements/dev.txt
# What Dockerfile.engine adds to an image that has vLLM.
lock "$1" image --extra modelscope --extra otel --constraint requirements/cuda.txt
