#!/usr/bin/env bash
# Installs, prepares the data, trains (or resumes) and evaluates on this machine.
# usage: bash launch/local.sh [--dry-run] [CONFIG [WORKDIR [--config.x=y ...]]]
# PROCESSES=N trains with N processes, each with one GPU where there are GPUs; PORT is theirs.
set -euo pipefail
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
config=${1:-configs/shapes.py}
workdir=${2:-runs/shapes}
shift $(($# < 2 ? $# : 2))
[ -e "$config" ] && config=$(realpath "$config")
workdir=$(realpath -m "$workdir")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/dry_run.sh
source launch/dry_run.sh
# shellcheck source=launch/install.sh
source launch/install.sh
run install_project ""

python=.venv/bin/python
processes=${PROCESSES:-1}
run "$python" -m fne_jax.prepare --config="$config" "$@"
train=("$python" -m fne_jax.train --config="$config" --workdir="$workdir" "$@")
if [ "$processes" = 1 ]; then
  run "${train[@]}"
else
  started=()
  # One signal to this script becomes one to each process: in process groups of their own (-m)
  # they do not see the terminal's Ctrl-C as well, and take it for a second.
  set -m
  trap 'kill -TERM "${started[@]}"' INT TERM
  for ((index = 0; index < processes; index++)); do
    command=(env JAX_LOCAL_DEVICE_IDS="$index" "${train[@]}" --processes="$processes"
      --process-index="$index" --coordinator="localhost:${PORT:-12355}")
    if [ "${DRY_RUN:-0}" = 1 ]; then
      run "${command[@]}"
    else
      "${command[@]}" & # without `run`, whose shell would take the signal
      started+=($!)
    fi
  done
  status=0
  for process in ${started[@]+"${started[@]}"}; do
    # A trapped signal ends `wait` early: wait again for the process itself.
    while kill -0 "$process" 2>/dev/null; do wait "$process" || status=$?; done
    wait "$process" || status=$?
  done
  trap - INT TERM
  [ "$status" = 0 ] || exit "$status"
fi
run "$python" -m fne_jax.evaluate --workdir="$workdir" --checkpoint=best --split=test
cat <<EOF

TensorBoard logs  .venv/bin/tensorboard --logdir $workdir
checkpoints       $workdir/checkpoints
metrics           $workdir/eval_test.json and $workdir/metrics.jsonl
EOF
