#!/usr/bin/env bash
# Installs, prepares the data, trains (or resumes) and evaluates on this machine.
# usage: bash launch/local.sh [--dry-run] [CONFIG [WORKDIR [--config.x=y ...]]]
# Paths are relative to where it is called; CONFIG may be relative to the top level too.
# PROCESSES=N trains with N processes, each with one GPU where there are GPUs; PORT is theirs.
set -euo pipefail
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
top=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
config=${1:-configs/shapes.py}
workdir=${2:-runs/shapes}
shift $(($# < 2 ? $# : 2))
[ -e "$config" ] || [ ! -e "$top/$config" ] || config=$top/$config
# shellcheck source=launch/dry_run.sh
source "$top/launch/dry_run.sh"
# shellcheck source=launch/install.sh
source "$top/launch/install.sh"

# Announces a step; who is to end it says so by `ended`.
announce() {
  [ "${DRY_RUN:-0}" = 1 ] || printf '\n== %s\n' "$*"
  since=$SECONDS
}

ended() {
  [ "${DRY_RUN:-0}" = 1 ] || printf '   done in %d s\n' $((SECONDS - since))
}

announce "1/4 install into $top/.venv"
run install_project ""
ended

# One signal to this script becomes one to each process: in process groups of their own (-m) they
# do not see the terminal's Ctrl-C as well, and take it for a second.
set -m
started=()
for signal in INT TERM HUP; do
  # shellcheck disable=SC2064
  trap "kill -$signal \${started[@]+\"\${started[@]}\"} 2>/dev/null || true" "$signal"
done

begin() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    run "$@"
  else
    "$@" & # without `run`, whose shell would take the signal
    started+=($!)
  fi
}

# Waits for what has begun; exits if any of it failed.
finish() {
  local status=0 code process
  for process in ${started[@]+"${started[@]}"}; do
    code=0
    # A trapped signal ends `wait` early: wait again for the process itself.
    while kill -0 "$process" 2>/dev/null; do wait "$process" || true; done
    wait "$process" || code=$?
    [ "$code" = 0 ] || status=$code
  done
  started=()
  [ "$status" = 0 ] || exit "$status"
  ended
}

# -P: a folder fne_jax where this is called is not the package.
python=("$top/.venv/bin/python" -P -m)
processes=${PROCESSES:-1}
announce "2/4 prepare the data of $config"
begin "${python[@]}" fne_jax.prepare --config="$config" "$@"
finish
train=("${python[@]}" fne_jax.train --config="$config" --workdir="$workdir" "$@")
announce "3/4 train in $workdir (stop with Ctrl-C; the same command goes on)"
if [ "$processes" = 1 ]; then
  begin "${train[@]}"
else
  for ((index = 0; index < processes; index++)); do
    begin env JAX_LOCAL_DEVICE_IDS="$index" "${train[@]}" --processes="$processes" \
      --process-index="$index" --coordinator="localhost:${PORT:-12355}"
  done
fi
finish
announce "4/4 evaluate on the test split"
begin "${python[@]}" fne_jax.evaluate --workdir="$workdir" --checkpoint=best --split=test
finish
# Quoted, to be copied.
bin=$(printf %q "$top/.venv/bin")
quoted=$(printf %q "$workdir")
extra=$(printf %q "${top}[review]")
cat <<EOF

report       $workdir/report.html
metrics      $workdir/eval_test.json and $workdir/metrics.jsonl
TensorBoard  $bin/tensorboard --logdir $quoted

Next, search the test images by a sentence, then judge what the labels may have missed:
  $bin/python -m fne_jax.search --workdir=$quoted --images=test "a large red circle"
  $bin/python -m fne_jax.review --workdir=$quoted    # after $bin/pip install -e $extra
EOF
