#!/usr/bin/env bash
# Checks the Triton backend on a GPU, then measures it; rows go to "${OUT:-bench/results}". `bench/gpu.sh --help` says more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec </dev/null
exec "${PYTHON:-python3}" -m bench.gpu "$@"
