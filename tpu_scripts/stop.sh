#!/usr/bin/env bash
# stop.sh NAME --zone ZONE [options]: sends SIGTERM to the command on every host; training saves a checkpoint and exits.
#
#   --timeout SECONDS   how long to wait for that (600)
#   --kill              send SIGKILL after the timeout: progress since the last checkpoint is lost
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run           print the commands without running them
#
# The TPUs stay and are billed; delete.sh deletes them. A keep_running.sh of the run ends too.

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
