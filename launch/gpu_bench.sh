#!/usr/bin/env bash
# On a machine with one GPU: the tests that need one, then the whole train step of configs/flickr30k.py
# against PyTorch's and against its plan, one JSON file per variant, with its error if it fails.
# usage: bash launch/gpu_bench.sh [--dry-run] [OUT [benchmark's or config's arguments ...]]
#   e.g. bash launch/gpu_bench.sh gpu_bench --rounds=1
# PYTORCH_PYTHON=PATH  interpreter of PyTorch's parts, where its CUDA libraries are not JAX's
set -euo pipefail
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
out=$(realpath -m "${1:-gpu_bench}")
shift $(($# < 1 ? $# : 1))
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/dry_run.sh
source launch/dry_run.sh
# shellcheck source=launch/install.sh
source launch/install.sh
run install_project "[cuda,test]"
run mkdir -p "$out"

failed=0
run .venv/bin/python -m pytest -m gpu || failed=1
measure() {
  local name=$1
  shift
  run .venv/bin/python -m fne_jax.benchmark step --config=configs/flickr30k.py \
    --out="$out/$name.json" --pytorch-python="${PYTORCH_PYTHON:-.venv/bin/python}" "$@" || failed=1
}
measure as_configured "$@"
measure kept --config.encoder.remat=none "$@"
measure kept_256 --batch=256 --config.encoder.remat=none "$@"
measure unfused --config.encoder.remat=none --config.encoder.attention=xla "$@"
exit "$failed"
