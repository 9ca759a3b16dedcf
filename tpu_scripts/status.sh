#!/usr/bin/env bash
# status.sh NAME --zone ZONE [--workdir gs://BUCKET/RUN]: shows the queued resource, its TPU VMs and hosts, and the run.
#
#   --workdir gs://...   also the newest line of metrics.jsonl and the heartbeat, or the final numbers
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run            print the commands without running them

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

workdir=''
parse "workdir zone project slices" "" "$@"
check_name
check_location
check_slices
if [[ -n $workdir ]]; then check_workdir; fi

state=$(queue_state ACTIVE) || fail "cannot read the state of $NAME" 1
if [[ -z $dry_run ]]; then echo "queued resource $NAME: $state"; fi
case $state in
  ACTIVE)
    for node in $(nodes); do
      run gcloud compute tpus tpu-vm describe "$node" "${LOCATION[@]}" '--format=value(name.basename(),acceleratorType,state,health)'
    done
    if [[ -n $dry_run ]]; then
      worker_states
    elif states=$(worker_states); then
      # Count the hosts in each state, and list those that are not running.
      awk '{ count[$2]++ } END { for (state in count) printf "hosts %s: %d\n", state, count[state] }' <<<"$states"
      awk '$2 != "running" { print "  " $0 }' <<<"$states" | head -n 20
    else
      say "not every host answered"
    fi
    ;;
  FAILED | SUSPENDED) # show the reason
    run gcloud compute tpus queued-resources describe "$NAME" "${LOCATION[@]}"
    ;;
esac

if [[ -n $workdir ]]; then
  if [[ -n $dry_run ]]; then
    run gcloud storage cat "$workdir/DONE.json"
    run gcloud storage cat --range=-65536 "$workdir/metrics.jsonl"
    run gcloud storage cat "$workdir/heartbeat"
  elif finished=$(gcloud storage cat "$workdir/DONE.json" 2>/dev/null); then
    echo "the run is done: $finished"
  elif metrics=$(gcloud storage cat --range=-65536 "$workdir/metrics.jsonl" 2>/dev/null); then
    tail -n 1 <<<"$metrics"
    gcloud storage cat "$workdir/heartbeat" 2>/dev/null || echo "no heartbeat"
    echo "now $(date -u +%FT%TZ)"
  else
    echo "no metrics in $workdir yet"
  fi
fi
