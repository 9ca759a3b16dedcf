#!/usr/bin/env bash
# sweep_vms.sh PREFIX --workers N --type TYPE --zone ZONE --workdir gs://BUCKET/SWEEP [options] -- sweep run SWEEP [...]
#
# Runs a sweep on N separate slices, PREFIX-0 to PREFIX-(N-1). Each has its own keep_running.sh, whose worker claims one
# pending cell after another from the sweep's directory until none is left; then its TPUs are deleted. To add workers
# later, call it again with another prefix.
#
#   --workers N          number of slices
#   --log-dir DIR        for the output of each keep_running.sh (PREFIX-logs)
#   --type --spot --reserved --runtime-version --valid-until-duration --service-account --network --subnetwork
#   --internal-ips --package --wheel --python --uv --workdir --flags --env --poll --max-failures --max-restarts
#   --zone --project     as for keep_running.sh
#   --dry-run            print the commands without running them

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

handed_on="type runtime-version valid-until-duration service-account network subnetwork package wheel python uv workdir
 flags env poll max-failures max-restarts zone project"
workers='' log_dir='' workdir='' type=''
parse "workers log-dir $handed_on" "spot reserved internal-ips" "$@"
check_name
check_count workers "$workers" 1
check_location
[[ -n $type ]] || fail "give --type, for example v5e-8"
resolve_type "$type"
check_workdir
check_environment
check_command
[[ ${COMMAND[0]} == sweep ]] || fail "the command must be sweep run SWEEP; use keep_running.sh for a single run"
pass_on "$handed_on spot reserved internal-ips dry-run"

if [[ -n $dry_run ]]; then
  for ((i = 0; i < workers; i++)); do
    "$HERE/keep_running.sh" "$NAME-$i" "${WORDS[@]}" --delete -- "${COMMAND[@]}"
  done
  exit 0
fi

log_dir=${log_dir:-$NAME-logs}
mkdir -p "$log_dir"
watchers=()
# Ctrl-C does not reach the background processes of a script.
trap 'kill "${watchers[@]}" 2>/dev/null; say "no longer watching; the slices stay and are billed: delete.sh $NAME-0, ..."; exit 130' INT TERM
for ((i = 0; i < workers; i++)); do
  "$HERE/keep_running.sh" "$NAME-$i" "${WORDS[@]}" --delete -- "${COMMAND[@]}" >"$log_dir/$NAME-$i.log" 2>&1 &
  watchers+=($!)
  say "$NAME-$i: see $log_dir/$NAME-$i.log"
done
status=0
for ((i = 0; i < workers; i++)); do
  code=0
  wait "${watchers[$i]}" || code=$?
  say "$NAME-$i ended with exit code $code"
  ((code <= status)) || status=$code
done
exit "$status"
