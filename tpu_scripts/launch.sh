#!/usr/bin/env bash
# launch.sh NAME --zone ZONE --workdir gs://BUCKET/RUN [options] -- train EXPERIMENT [...] | sweep run SWEEP [...]
#
# Starts the same diffusionlm command on every host of NAME, which setup.sh made ready. It goes on after this script
# and your session end. If a command is running on one of the hosts, nothing is started.
#
#   --workdir gs://...   the run directory; handed to diffusionlm
#   --flags SET          compiler flags of xla_flags.conf; may be repeated
#   --env NAME=VALUE     for the command; may be repeated
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run            print the commands, run none
#
# The same launch on the same run directory goes on with the run.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

workdir=''
parse "workdir flags env zone project slices" "" "$@"
check_name
check_location
check_slices
check_workdir
check_environment
check_command

# The sets are known names before anything is asked, and fit the chips once those are known.
for set in ${FLAG_SETS[@]+"${FLAG_SETS[@]}"}; do flags_of "$set" '' >/dev/null; done
generation=''
if [[ ${#FLAG_SETS[@]} -gt 0 && -z $dry_run ]]; then
  accelerator=$(gcloud compute tpus tpu-vm describe "$(nodes | head -n 1)" "${LOCATION[@]}" '--format=value(acceleratorType)') ||
    fail "cannot read the type of $NAME" 1
  if [[ -n $accelerator ]]; then resolve_type "$accelerator"; fi
fi
compiler_flags "$generation"

if [[ -n $dry_run ]]; then
  worker_states
else
  states=$(worker_states) || fail "not every host of $NAME answered; was it set up? (setup.sh $NAME)" 1
  if grep -q ' running ' <<<"$states"; then
    fail "$(grep -c ' running ' <<<"$states") of $(grep -c . <<<"$states") hosts of $NAME run a command already; stop.sh $NAME first" 3
  fi
fi
worker_words bash "$WORKER" start
on_hosts all "${WORDS[@]}" || fail "not started on every host; stop.sh $NAME, then see logs.sh $NAME --worker all" 1
