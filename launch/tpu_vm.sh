#!/usr/bin/env bash
# Trains on a Cloud TPU slice: requests it, waits, installs on all its workers, trains; if a spot slice is
# preempted, requests another and resumes from the last checkpoint. Deletes the slice at the end; keeps it
# after an error that the user can fix, after ten failures in a row, and when stopped itself (Ctrl-C),
# which stops the run, saved.
# usage: bash launch/tpu_vm.sh [--dry-run] NAME ZONE TYPE CONFIG WORKDIR [--config.x=y ...]
#   e.g. NFS=10.0.0.2:/runs bash launch/tpu_vm.sh fne us-west4-a v5litepod-16 \
#     configs/flickr30k.py /runs/flickr30k --config.data.dir=/runs/flickr30k-data
# NFS=HOST:/SHARE  shared folder mounted under /SHARE on all workers; WORKDIR and data lie in it
# SPOT=0           requests a slice that is not preempted
# RUNTIME          software version of the TPU VMs, if the one below does not fit TYPE
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
# A line that died with its VM would be waited for without end.
alive=(--ssh-flag="-o ServerAliveInterval=30" --ssh-flag="-o ServerAliveCountMax=4")

# Prints the state of the request, GONE without one. A question that failed otherwise tells nothing,
# and is asked again.
state() {
  local answer try
  for try in {1..20}; do
    if answer=$("${queued[@]}" describe "$name" --zone="$zone" --format='value(state.state)' \
      2>"$scratch/error"); then
      echo "$answer"
      return
    fi
    if grep -q NOT_FOUND "$scratch/error"; then
      echo GONE
      return
    fi
    echo "try $try: $(cat "$scratch/error")" >&2
    sleep "${POLL_SECONDS:-30}"
  done
  return 74
}

on_all_workers() {
  run "${vm[@]}" ssh "$name" --zone="$zone" --worker=all "${alive[@]}" --command="$1"
}

ask_for_slice() {
  run "${queued[@]}" create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type" \
    --runtime-version="$runtime" "${spot[@]}"
}

delete_slice() {
  run "${queued[@]}" delete "$name" --zone="$zone" --force --quiet
}

# Quoted once more: the commands pass through a shell on the workers.
install="mkdir -p fne_jax && tar -xzf fne_jax.tar.gz -C fne_jax && bash fne_jax/launch/tpu_worker.sh \
install $(printf '%q' "$NFS")"
train="bash fne_jax/launch/tpu_worker.sh train --config=$(printf '%q ' "$config" --workdir="$workdir" "$@")"
train_on_slice() {
  run "${vm[@]}" scp "$scratch/fne_jax.tar.gz" "$name:fne_jax.tar.gz" --zone="$zone" --worker=all &&
    on_all_workers "$install" && on_all_workers "$train"
}

leave() {
  echo "error: $1; look at the slice, then delete it with" >&2
  echo "${queued[*]} delete $name --zone=$zone --force" >&2
  exit "$2"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'trap - INT TERM HUP; on_all_workers "bash fne_jax/launch/tpu_worker.sh stop" || true
  leave "stopped" 130' INT TERM HUP
# The slice runs what is committed here.
run git archive --format=tar.gz --output="$scratch/fne_jax.tar.gz" HEAD
if [ "${DRY_RUN:-0}" = 1 ]; then
  ask_for_slice
  train_on_slice
  delete_slice
  exit
fi

failures=0
while true; do
  now=$(state) || leave "gcloud gives no answer" 74
  case $now in
    GONE) ask_for_slice ;;
    SUSPENDED)
      echo "the slice was taken away; asking for another" >&2
      delete_slice
      failures=0
      ;;
    FAILED)
      echo "error: the request failed; see: ${queued[*]} describe $name --zone=$zone" >&2
      exit 1
      ;;
    ACTIVE)
      status=0 SECONDS=0
      train_on_slice || status=$?
      [ "$status" != 0 ] || break
      [ "$status" != 2 ] || leave "a mistake, named above, ended the run" 2
      # Taken away perhaps, which shows only after a while; a lost line; a failure of a machine. What
      # ran for long has gone on from its checkpoint.
      [ "$SECONDS" -lt 1800 ] || failures=0
      failures=$((failures + 1))
      [ "$failures" -lt 10 ] || leave "the run ended with $status, $failures times in a row" "$status"
      echo "the run ended with $status; once more if the slice is still there" >&2
      sleep "${POLL_SECONDS:-30}"
      ;;
    *) sleep "${POLL_SECONDS:-30}" ;;
  esac
done
delete_slice
