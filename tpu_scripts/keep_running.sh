#!/usr/bin/env bash
# keep_running.sh NAME --type TYPE --zone ZONE --workdir gs://BUCKET/RUN [options] -- train EXPERIMENT [...]
#
# From nothing to a finished run: creates the TPUs, sets up their hosts, launches, and looks every minute. When the TPUs
# are taken away, or their creation fails, it deletes them, asks anew, and launches again: the same command on the same run
# directory goes on from the newest checkpoint. Let it run where it can stay, in tmux for instance.
#
#   --type --spot --reserved --runtime-version --valid-until-duration --service-account
#   --network --subnetwork --internal-ips     as for create.sh
#   --package --wheel --python --uv           as for setup.sh
#   --workdir --flags --env                   as for launch.sh
#   --poll SECONDS       between looks (60)
#   --max-failures N     creations, installations or launches that fail in a row (5); being preempted does not count
#   --max-restarts N     ends of the command in a row within an hour of its start (3)
#   --delete             give the TPUs back when the command is done, has failed, or was stopped by stop.sh
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run            print the commands of the way without incidents, run none
#
# Exit code 0: done. 1: it failed too often. 2: a mistake in the command. 4: ended by stop.sh.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

of_create="type runtime-version valid-until-duration service-account network subnetwork"
of_setup="package wheel python uv"
of_launch="workdir flags env"
type='' workdir='' poll=60 max_failures=5 max_restarts=3 delete=''
parse "$of_create $of_setup $of_launch poll max-failures max-restarts zone project slices" \
  "spot reserved internal-ips delete" "$@"
check_name
[[ -n $type ]] || fail "give --type, for instance v5e-8"
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

HEALTHY_SECONDS=3600 # a command that lived that long did not end for the same reason again
MIXED_LOOKS=4        # looks at hosts that ended while others run, before all are started anew: JAX ends those itself

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

# leave CODE MESSAGE: the end.
leave() {
  say "$2 (preempted $preemptions times)"
  if [[ -n $delete ]]; then
    delete_queue || fail "could not delete $NAME: it still costs" 1
  else
    say "$NAME stays, and costs; delete.sh $NAME --zone=$zone gives it back"
  fi
  exit "$1"
}

# failed MESSAGE: counts, waits, and gives up at some time.
failed() {
  failures=$((failures + 1))
  say "$1 ($failures of $max_failures in a row)"
  if ((failures >= max_failures)); then leave 1 "gave up"; fi
  sleep "$poll"
}

trap 'say "no longer watching; $NAME and its command go on: status.sh, stop.sh, delete.sh"; exit 130' INT

# Deletes what was taken away; the next look creates it anew.
recreate() {
  ready=''
  delete_queue || say "could not delete $NAME; trying again"
}

# The first TPU VM that was taken away while the queued resource says nothing of it.
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
    say "starting again ($restarts of $max_restarts in a row): $1"
  fi
  if launch; then
    launched=$(date +%s) failures=0
  else
    failed "could not launch"
  fi
}

# What the hosts of a working pod do, and what follows.
look_at_hosts() {
  local states node
  if ! states=$(worker_states); then
    node=$(lost_node)
    if [[ -n $node ]]; then
      preemptions=$((preemptions + 1))
      say "$node was taken away"
      recreate
    else
      say "not every host answers; looking again" # its command most likely goes on
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
    leave 2 "the command has a mistake in it, see above"
  elif grep -q ' stopped ' <<<"$states"; then
    ((running)) || leave 4 "stopped by stop.sh"
  elif ((running == all)); then
    mixed=0
  elif ((running)) && ((++mixed < MIXED_LOOKS)); then
    say "$running of $all hosts run; waiting for the others to notice"
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
        say "done: $workdir/DONE.json is there (preempted $preemptions times)"
        exit 0
      fi
      say "asking for $type in $zone"
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
      say "preempted; asking anew"
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
    UNKNOWN) say "the state of $NAME cannot be read; looking again" ;;
    *) say "$NAME is $state" ;;
  esac
  sleep "$poll"
done
