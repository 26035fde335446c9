#!/usr/bin/env bash
# What tpu_vm.sh does on each worker of a slice.
# usage: bash launch/tpu_worker.sh install HOST:/SHARE    mounts the share as /SHARE, and installs
#        bash launch/tpu_worker.sh train ARGUMENTS ...    stops a run left here, and trains
#        bash launch/tpu_worker.sh stop                   stops the run here; it saves first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
source launch/install.sh
pid_file=run.pid

install_packages() {
  # A new VM updates itself for some minutes, and holds apt's locks meanwhile.
  local try
  for try in {1..60}; do
    if sudo apt-get -qq update && sudo apt-get -qq install -y "$@"; then return; fi
    echo "apt is not ready (try $try)" >&2
    sleep "${POLL_SECONDS:-10}"
  done
  return 74
}

# A run outlives the ssh that began it, and holds the TPU.
is_there() {
  [ -f "$pid_file" ] || return 1
  [[ "$(tr '\0' ' ' <"/proc/$(cat "$pid_file")/cmdline")" == *fne_jax.train* ]]
} 2>/dev/null

stop() {
  local second=0
  is_there || return 0
  echo "stopping the run that is left here" >&2
  kill -TERM "$(cat "$pid_file")" || true
  while is_there; do
    [ "$second" -lt 120 ] || kill -KILL "$(cat "$pid_file")" || true
    second=$((second + 1))
    sleep 1
  done
}

case ${1:-} in
  install)
    share=/${2#*:/}
    # The VMs' own Python is older than 3.11.
    install_packages python3.11-venv nfs-common
    sudo mkdir -p "$share"
    mountpoint -q "$share" || sudo mount "$2" "$share"
    PYTHON=python3.11 install_project "[tpu]"
    ;;
  train)
    stop
    echo "$$" >"$pid_file"
    exec .venv/bin/python -m fne_jax.train "${@:2}"
    ;;
  stop) stop ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
