#!/usr/bin/env bash
# stop.sh NAME --zone ZONE [options]: SIGTERM to the command on every host; training saves a checkpoint and ends.
#
#   --timeout SECONDS   to wait for that (600)
#   --kill              SIGKILL after the timeout: what came after the last checkpoint is lost
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run           print the commands, run none
#
# The TPU stays, and costs: delete.sh gives it back. keep_running.sh takes this as the end of its work.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

timeout=600 kill=''
parse "timeout zone project slices" "kill" "$@"
check_name
check_location
check_slices
check_count timeout "$timeout" 0
words=(bash "$WORKER" stop --timeout "$timeout")
if [[ -n $kill ]]; then words+=(--kill); fi
on_hosts all "${words[@]}" || fail "not every host stopped" 1
