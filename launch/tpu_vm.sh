#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it, waits, installs on all its workers, trains; where a spot
# slice is taken away, asks again and goes on from the last checkpoint. Deletes the slice at the end.
# usage: bash launch/tpu_vm.sh [--dry-run] NAME ZONE TYPE CONFIG WORKDIR [--config.x=y ...]
#   e.g. NFS=10.0.0.2:/runs bash launch/tpu_vm.sh fne us-west4-a v5litepod-16 \
#     configs/flickr30k.py /runs/flickr30k --config.data.dir=/runs/flickr30k-data
# NFS=HOST:/SHARE  shared folder mounted under /SHARE on all workers; WORKDIR and data lie in it
# SPOT=0           asks for a slice that is not taken away
# RUNTIME          software version of the TPU VMs, where the one below does not fit TYPE
set -euo pipefail
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
if [ $# -lt 5 ] || [ -z "${NFS:-}" ]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
name=$1 zone=$2 type=$3 config=$4 workdir=$5
shift 5
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/dry_run.sh
source launch/dry_run.sh

case $type in
  v4-*) default=tpu-ubuntu2204-base ;;
  v5litepod-*) default=v2-alpha-tpuv5-lite ;;
  v5p-*) default=v2-alpha-tpuv5 ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  *) default= ;;
esac
runtime=${RUNTIME:-$default}
if [ -z "$runtime" ]; then
  echo "error: no software version is known for $type; set RUNTIME" >&2
  exit 2
fi
spot=()
[ "${SPOT:-1}" = 0 ] || spot=(--spot)
queued=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

state() {
  [ "${DRY_RUN:-0}" = 0 ] || { echo ACTIVE && return; }
  "${queued[@]}" describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null || true
}

on_all_workers() {
  run "${vm[@]}" ssh "$name" --zone="$zone" --worker=all --command="$1"
}

# The slice runs what is committed here.
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
run git archive --format=tar.gz --output="$archive" HEAD
share=/${NFS#*:/}
# The VMs' own Python is older than 3.11.
prepare="sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv nfs-common &&
  sudo mkdir -p $share && { mountpoint -q $share || sudo mount $NFS $share; } &&
  mkdir -p fne_jax && tar -xzf fne_jax.tar.gz -C fne_jax && cd fne_jax &&
  source launch/install.sh && PYTHON=python3.11 install_project '[tpu]'"
# Quoted once more: the command passes through a shell on the workers.
train=$(printf '%q ' .venv/bin/python -m fne_jax.train --config="$config" --workdir="$workdir" "$@")

while true; do
  if [ "$(state)" = SUSPENDED ]; then
    run "${queued[@]}" delete "$name" --zone="$zone" --force --quiet
  fi
  if [ -z "$(state)" ] || [ "${DRY_RUN:-0}" = 1 ]; then
    run "${queued[@]}" create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type" \
      --runtime-version="$runtime" "${spot[@]}"
  fi
  until [ "$(state)" = ACTIVE ]; do
    if [ "$(state)" = FAILED ]; then
      echo "error: the request failed; see: ${queued[*]} describe $name --zone=$zone" >&2
      exit 1
    fi
    sleep "${POLL_SECONDS:-30}"
  done
  status=0
  {
    run "${vm[@]}" scp "$archive" "$name:fne_jax.tar.gz" --zone="$zone" --worker=all &&
      on_all_workers "$prepare" && on_all_workers "cd fne_jax && exec $train"
  } || status=$?
  [ "$status" != 0 ] || break
  if [ "$(state)" = ACTIVE ]; then
    echo "error: the run ended with $status while its slice is there; look, then delete it with" >&2
    echo "${queued[*]} delete $name --zone=$zone --force" >&2
    exit "$status"
  fi
  echo "the slice was taken away; asking for another" >&2
  until [ "$(state)" = SUSPENDED ] || [ -z "$(state)" ]; do sleep "${POLL_SECONDS:-30}"; done
done
run "${queued[@]}" delete "$name" --zone="$zone" --force --quiet
