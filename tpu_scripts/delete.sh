#!/usr/bin/env bash
# delete.sh NAME --zone ZONE: deletes the TPUs and their queued resource. Buckets are not touched.
#
#   --force     even while a command is running on the hosts
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run   print the commands without running them

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

force=''
parse "zone project slices" "force" "$@"
check_name
check_location
check_slices
state=$(queue_state ACTIVE) || fail "cannot read the state of $NAME" 1
if [[ $state == ABSENT ]]; then
  say "$NAME does not exist"
  exit 0
fi
if [[ $state == ACTIVE && -z $force ]]; then
  if [[ -n $dry_run ]]; then
    worker_states
  elif states=$(worker_states 2>/dev/null) && grep -q ' running ' <<<"$states"; then
    fail "a command is running on $NAME; stop.sh $NAME lets it save first, --force does not wait for that" 3
  fi
fi
delete_queue
