#!/usr/bin/env bash
# logs.sh NAME --zone ZONE [options]: prints the output of the command of launch.sh.
#
#   --worker N|all    the host (0; only the first one reports progress)
#   --lines N         number of lines, from the end (50)
#   --follow          keep printing new output, until Ctrl-C
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run         print the commands without running them

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

worker=0 lines=50 follow=''
parse "worker lines zone project slices" "follow" "$@"
check_name
check_location
check_slices
check_count lines "$lines" 1
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker '$worker' must be a number, or all"
[[ -z $follow || $worker != all ]] || fail "--follow needs a single --worker"
words=(bash "$WORKER" log --lines "$lines")
if [[ -n $follow ]]; then words+=(--follow); fi
on_hosts "$worker" "${words[@]}"
