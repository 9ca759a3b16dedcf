#!/usr/bin/env bash
# xpk_sweep.sh PREFIX --workers N|pending --cluster CLUSTER --type TYPE --image IMAGE --workdir gs://BUCKET/SWEEP [options]
#              -- sweep run SWEEP [...]
#
# Runs a sweep on GKE as N identical workloads, PREFIX-0 to PREFIX-(N-1). Each claims one pending cell after another from
# the sweep's directory until none is left; workloads without room wait in Kueue's queue.
#
#   --workers N|pending   `pending`: one for each pending cell of `diffusionlm sweep status SWEEP --workdir DIR --json`
#   --cluster --type --image --workdir --flags --env --priority --max-restarts --grace --spot --slices
#   --zone --project      as for xpk_run.sh
#   --dry-run             print the commands without running them
#
# Existing workloads are left alone.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

handed_on="cluster type image workdir flags env priority max-restarts grace zone project slices"
workers='' workdir=''
parse "workers $handed_on" "spot" "$@"
check_name
check_workdir
check_command
[[ ${COMMAND[0]} == sweep ]] || fail "the command must be sweep run SWEEP; use xpk_run.sh for a single run"
if [[ $workers == pending ]]; then
  status=(diffusionlm sweep status "${COMMAND[2]}" --workdir "$workdir" --json)
  if [[ " ${COMMAND[*]} " == *" --all "* ]]; then status+=(--all); fi
  if [[ -n $dry_run ]]; then
    run "${status[@]}"
    workers=1
  else
    workers=$("${status[@]}" | python3 -c 'import json, sys; print(json.load(sys.stdin)["pending"])') ||
      fail "cannot count the pending cells of ${COMMAND[2]}" 1
    if [[ $workers == 0 ]]; then
      say "no cell of ${COMMAND[2]} is pending"
      exit 0
    fi
  fi
fi
check_count workers "$workers" 1
pass_on "$handed_on spot dry-run"
for ((i = 0; i < workers; i++)); do
  "$HERE/xpk_run.sh" "$NAME-$i" "${WORDS[@]}" -- "${COMMAND[@]}"
done
