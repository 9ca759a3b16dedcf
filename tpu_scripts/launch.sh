#!/usr/bin/env bash
# launch.sh NAME --zone ZONE --workdir gs://BUCKET/RUN [options] -- train EXPERIMENT [...] | sweep run SWEEP [...]
#
# Starts the same diffusionlm command on every host of NAME, which setup.sh has set up. It keeps running after this script
# and your session end. Nothing is started if a command is already running on one of the hosts.
#
#   --workdir gs://...   the run directory, passed to diffusionlm
#   --flags SET          a set of compiler flags from xla_flags.conf; may be repeated
#   --env NAME=VALUE     an environment variable of the command; may be repeated
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run            print the commands without running them
#
# The same launch on the same run directory resumes the run.

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

# Check the names of the sets before asking the cloud, and their generations once the chips are known.
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
    fail "$(grep -c ' running ' <<<"$states") of $(grep -c . <<<"$states") hosts of $NAME are already running a command; stop.sh $NAME first" 3
  fi
fi
worker_words bash "$WORKER" start
on_hosts all "${WORDS[@]}" || fail "not started on every host; stop.sh $NAME, then see logs.sh $NAME --worker all" 1
