#!/usr/bin/env bash
# keep_running.sh NAME --type TYPE --zone ZONE --workdir gs://BUCKET/RUN [options] -- train EXPERIMENT [...]
#
# Takes a run from nothing to its end: creates the TPUs, sets up their hosts, launches the command, and checks it every
# minute. If the TPUs are preempted, or cannot be created, it deletes and requests them again and relaunches: the same
# command on the same run directory resumes from the newest checkpoint. Run it where it can stay up, for example in tmux.
#
#   --type --spot --reserved --runtime-version --valid-until-duration --service-account
#   --network --subnetwork --internal-ips     as for create.sh
#   --package --wheel --python --uv           as for setup.sh
#   --workdir --flags --env                   as for launch.sh
#   --poll SECONDS       between checks (60)
#   --max-failures N     creations, installations or launches that may fail in a row (5); preemptions do not count
#   --max-restarts N     how often in a row the command may end within an hour of its start (3)
#   --delete             delete the TPUs when the command is done, has failed, or was stopped by stop.sh
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run            print the commands of a run without incidents, without running them
#
# Exit codes: 0, done; 1, failed too often; 2, a mistake in the command; 4, ended by stop.sh.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

of_create="type runtime-version valid-until-duration service-account network subnetwork"
of_setup="package wheel python uv"
of_launch="workdir flags env"
type='' workdir='' poll=60 max_failures=5 max_restarts=3 delete=''
parse "$of_create $of_setup $of_launch poll max-failures max-restarts zone project slices" \
  "spot reserved internal-ips delete" "$@"
check_name
[[ -n $type ]] || fail "give --type, for example v5e-8"
resolve_type "$type"
check_location
check_slices
check_workdir
check_environment
check_command
check_count poll "$poll" 0
check_count max-failures "$max_failures" 1
check_count max-restarts "$max_restarts" 0
for set in ${FLAG_SETS[@]+"${FLAG_SETS[@]}"}; do flags_of "$set" "$generation" >/dev/null; done

HEALTHY_SECONDS=3600 # a command that ran this long does not count as failing in a row
MIXED_LOOKS=4        # checks that find only some hosts running before all are restarted: JAX ends the others itself

where=("$NAME" "${LOCATION[@]}" "--slices=$slices")
if [[ -n $dry_run ]]; then where+=(--dry-run); fi
pass_on "$of_create spot reserved internal-ips"
create_options=("${WORDS[@]}")
pass_on "$of_setup"
setup_options=(${WORDS[@]+"${WORDS[@]}"})
pass_on "$of_launch"
launch_options=("${WORDS[@]}")

create() { "$HERE/create.sh" "${where[@]}" "${create_options[@]}"; }
setup() { "$HERE/setup.sh" "${where[@]}" ${setup_options[@]+"${setup_options[@]}"}; }
launch() { "$HERE/launch.sh" "${where[@]}" "${launch_options[@]}" -- "${COMMAND[@]}"; }

if [[ -n $dry_run ]]; then
  create
  queue_state ACTIVE >/dev/null
  setup
  launch
  worker_states
  if [[ -n $delete ]]; then delete_queue; fi
  exit 0
fi

preemptions=0 failures=0 restarts=0 ready='' launched=0 mixed=0

# leave CODE MESSAGE: ends this script, and deletes the TPUs if asked to.
leave() {
  say "$2 (preempted $preemptions times)"
  if [[ -n $delete ]]; then
    delete_queue || fail "could not delete $NAME: it is still billed" 1
  else
    say "$NAME stays and is billed; delete.sh $NAME --zone=$zone deletes it"
  fi
  exit "$1"
}

# failed MESSAGE: counts a failure and waits, or gives up after the last one.
failed() {
  failures=$((failures + 1))
  say "$1 ($failures of $max_failures in a row)"
  if ((failures >= max_failures)); then leave 1 "gave up"; fi
  sleep "$poll"
}

trap 'say "no longer watching; $NAME and its command continue: status.sh, stop.sh, delete.sh"; exit 130' INT

# Deletes what was preempted; the next check creates it again.
recreate() {
  ready=''
  delete_queue || say "could not delete $NAME; trying again"
}

# Prints the first TPU VM that was preempted although the queued resource does not show it.
lost_node() {
  local node
  for node in $(nodes); do
    case $(gcloud compute tpus tpu-vm describe "$node" "${LOCATION[@]}" '--format=value(state)' 2>/dev/null) in
      PREEMPTED | TERMINATED) echo "$node" && return ;;
    esac
  done
}

start_again() {
  if ((launched)); then
    if (($(date +%s) - launched > HEALTHY_SECONDS)); then restarts=0; fi
    restarts=$((restarts + 1))
    if ((restarts > max_restarts)); then
      "$HERE/logs.sh" "${where[@]}" --lines 30 >&2 || true
      leave 1 "the command ended $restarts times in a row soon after its start"
    fi
    say "restarting ($restarts of $max_restarts in a row): $1"
  fi
  if launch; then
    launched=$(date +%s) failures=0
  else
    failed "could not launch"
  fi
}

# Checks the hosts of an active pod and acts on their states.
look_at_hosts() {
  local states node
  if ! states=$(worker_states); then
    node=$(lost_node)
    if [[ -n $node ]]; then
      preemptions=$((preemptions + 1))
      say "$node was preempted"
      recreate
    else
      say "not every host answers; checking again" # its command most likely continues
    fi
    return
  fi
  local all running finished
  all=$(grep -c . <<<"$states") running=$(grep -c ' running ' <<<"$states" || true)
  finished=$(grep -c ' finished ' <<<"$states" || true)
  if ((finished == all)); then
    leave 0 "done"
  elif grep -q ' failed 2$' <<<"$states"; then
    "$HERE/logs.sh" "${where[@]}" --lines 30 >&2 || true
    leave 2 "the command has a mistake, see above"
  elif grep -q ' stopped ' <<<"$states"; then
    ((running)) || leave 4 "stopped by stop.sh"
  elif ((running == all)); then
    mixed=0
  elif ((running)) && ((++mixed < MIXED_LOOKS)); then
    say "$running of $all hosts are running; waiting for these to notice"
  else
    if ((running)); then on_hosts all bash "$WORKER" stop --timeout 60 --kill --again >/dev/null || true; fi
    mixed=0
    start_again "$(grep -v ' running ' <<<"$states" | head -n 1)"
  fi
}

while :; do
  state=$(queue_state '') || state=UNKNOWN
  case $state in
    ABSENT)
      if [[ ${COMMAND[0]} == train ]] && gcloud storage ls "$workdir/DONE.json" >/dev/null 2>&1; then
        say "done: $workdir/DONE.json exists (preempted $preemptions times)"
        exit 0
      fi
      say "requesting $type in $zone"
      launched=0
      create || failed "could not create $NAME"
      continue
      ;;
    FAILED)
      gcloud compute tpus queued-resources describe "$NAME" "${LOCATION[@]}" >&2 || true
      recreate
      failed "the request for $NAME failed, see above"
      continue
      ;;
    SUSPENDED)
      preemptions=$((preemptions + 1))
      say "preempted; requesting it again"
      recreate
      continue
      ;;
    ACTIVE)
      if [[ -z $ready ]]; then
        if setup; then
          ready=1 failures=0
        else
          failed "could not set up $NAME"
          continue
        fi
      fi
      look_at_hosts
      ;;
    UNKNOWN) say "cannot read the state of $NAME; checking again" ;;
    *) say "$NAME is $state" ;;
  esac
  sleep "$poll"
done
