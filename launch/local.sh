#!/usr/bin/env bash
# Installs, prepares the data, trains (or resumes) and evaluates on this machine.
# usage: bash launch/local.sh [CONFIG [WORKDIR [--config.x=y ...]]]
set -euo pipefail
config=${1:-configs/shapes.py}
workdir=${2:-runs/shapes}
shift $(($# < 2 ? $# : 2))
[ -e "$config" ] && config=$(realpath "$config")
workdir=$(realpath -m "$workdir")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_project ""

python=.venv/bin/python
$python -m fne_jax.prepare --config="$config" "$@"
$python -m fne_jax.train --config="$config" --workdir="$workdir" "$@"
$python -m fne_jax.evaluate --workdir="$workdir" --checkpoint=best --split=test
cat <<EOF

TensorBoard logs  .venv/bin/tensorboard --logdir $workdir
checkpoints       $workdir/checkpoints
metrics           $workdir/eval_test.json and $workdir/metrics.jsonl
EOF
