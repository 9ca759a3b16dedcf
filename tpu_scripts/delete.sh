#!/usr/bin/env bash
# delete.sh NAME --zone ZONE: gives the TPUs back, with the queued resource. Buckets are not touched.
#
#   --force     also while a command is running on its hosts
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run   print the commands, run none

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

force=''
parse "zone project slices" "force" "$@"
check_name
check_location
check_slices
state=$(queue_state ACTIVE) || fail "cannot read the state of $NAME" 1
if [[ $state == ABSENT ]]; then
  say "$NAME is not there"
  exit 0
fi
if [[ $state == ACTIVE && -z $force ]]; then
  if [[ -n $dry_run ]]; then
    worker_states
  elif states=$(worker_states 2>/dev/null) && grep -q ' running ' <<<"$states"; then
    fail "a command runs on $NAME; stop.sh $NAME lets it save first, --force does not care" 3
  fi
fi
delete_queue
