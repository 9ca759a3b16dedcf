#!/usr/bin/env bash
# profile.sh NAME --zone ZONE --workdir gs://BUCKET/RUN --output DIR [options] -- train EXPERIMENT [...]
#
# Traces some steps of a run with the profiler: stops the run if it is running (it saves), restarts it with
# --run.profile_start and --run.profile_steps set to a few steps later, waits for the trace and copies it to DIR. The run
# then continues. Give the command of launch.sh. A keep_running.sh would take the stop for the end of the run: end it
# first, and start it again afterwards.
#
#   --output DIR        a directory on this machine
#   --steps N           steps to trace (5); --skip N before them, so that the trace has no compilation in it (10)
#   --timeout SECONDS   how long to wait for the trace (1800); --poll SECONDS between checks (20)
#   --fetch-only        only copy the existing traces; needs no command
#   --flags --env       as for launch.sh
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run           print the commands without running them
#
# To view it: pip install xprof && xprof --logdir=DIR --port=8791, then http://localhost:8791.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

workdir='' output='' steps=5 skip=10 timeout=1800 poll=20 fetch_only=''
parse "workdir output steps skip timeout poll flags env zone project slices" "fetch-only" "$@"
check_name
check_location
check_slices
check_workdir
[[ -n $output ]] || fail "give --output, a directory on this machine"
check_count steps "$steps" 1
check_count skip "$skip" 1
check_count timeout "$timeout" 1
check_count poll "$poll" 0

# traces: prints the number of traces; a trace is finished when the file of a host exists.
traces() {
  gcloud storage ls "$workdir/profile/plugins/profile/**.xplane.pb" 2>/dev/null | grep -c . || true
}

fetch() {
  run mkdir -p "$output"
  run gcloud storage rsync --recursive "$workdir/profile" "$output"
  say "xprof --logdir=$(quote "$output") --port=8791 shows it (pip install xprof)"
}

if [[ -n $fetch_only ]]; then
  fetch
  exit 0
fi
check_command
[[ ${COMMAND[0]} == train ]] || fail "the command must be train EXPERIMENT [...], the same as for launch.sh"

where=("$NAME" "${LOCATION[@]}" "--slices=$slices")
if [[ -n $dry_run ]]; then where+=(--dry-run); fi
"$HERE/stop.sh" "${where[@]}"
if [[ -n $dry_run ]]; then
  run gcloud storage cat --range=-65536 "$workdir/metrics.jsonl"
  before=0 step=0
else
  before=$(traces)
  # The newest step; 0 for a run without metrics.
  step=$(gcloud storage cat --range=-65536 "$workdir/metrics.jsonl" 2>/dev/null |
    sed -n 's/.*"step": *\([0-9][0-9]*\).*/\1/p' | tail -n 1 || true)
fi
start=$((${step:-0} + skip))
pass_on "workdir flags env"
"$HERE/launch.sh" "${where[@]}" "${WORDS[@]}" -- "${COMMAND[@]}" --run.profile_start "$start" --run.profile_steps "$steps"
if [[ -z $dry_run ]]; then
  say "tracing steps $start to $((start + steps - 1))"
  deadline=$(($(date +%s) + timeout))
  until (($(traces) > before)); do
    (($(date +%s) < deadline)) || fail "no trace within $timeout s; see logs.sh $NAME" 1
    sleep "$poll"
  done
  sleep "$poll" # for the files of the other hosts
fi
fetch
