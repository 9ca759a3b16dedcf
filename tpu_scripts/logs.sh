#!/usr/bin/env bash
# logs.sh NAME --zone ZONE [options]: what the command of launch.sh printed.
#
#   --worker N|all    the host (0, the first: it alone reports progress)
#   --lines N         from the end (50)
#   --follow          and what comes, until Ctrl-C
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run         print the commands, run none

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

worker=0 lines=50 follow=''
parse "worker lines zone project slices" "follow" "$@"
check_name
check_location
check_slices
check_count lines "$lines" 1
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker '$worker' must be a number, or all"
[[ -z $follow || $worker != all ]] || fail "--follow goes with one --worker"
words=(bash "$WORKER" log --lines "$lines")
if [[ -n $follow ]]; then words+=(--follow); fi
on_hosts "$worker" "${words[@]}"
