#!/usr/bin/env bash
# create.sh NAME --type TYPE --zone ZONE [options]: requests one or several TPU slices as a queued resource.
#
#   --type TYPE                  v5e-8, v5e-256, v6e-64 (chips), v4-32, v5p-128 (TensorCores, two per chip)
#   --zone ZONE                  or CLOUDSDK_COMPUTE_ZONE; --project PROJECT, or CLOUDSDK_CORE_PROJECT, or gcloud's
#   --spot                       cheaper, may be preempted at any time; --reserved: from your reservation
#   --slices N                   several slices that train one model over the data-centre network (Multislice)
#   --runtime-version VERSION    software of the hosts; default: the one for JAX on this generation
#   --valid-until-duration TIME  give up waiting after TIME, for example 6h
#   --service-account EMAIL      the account of the hosts, which decides the buckets that they may use
#   --network NAME --subnetwork NAME --internal-ips
#   --replace                    delete an existing request that failed or was preempted, and request it again
#   --wait                       wait until it is active; --poll SECONDS between checks (30)
#   --dry-run                    print the commands without running them
#
# It may be repeated: an existing request is left alone.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

type='' spot='' reserved='' runtime_version='' valid_until_duration='' service_account='' network='' subnetwork=''
internal_ips='' replace='' wait='' poll=30
parse "type zone project slices runtime-version valid-until-duration service-account network subnetwork poll" \
  "spot reserved internal-ips replace wait" "$@"
check_name
[[ -n $type ]] || fail "give --type, for example v5e-8"
resolve_type "$type"
[[ $generation != tpu7x ]] || fail "--type '$type' is rented through GKE only; use xpk_run.sh"
check_location
check_slices
check_count poll "$poll" 0
[[ -z $spot || -z $reserved ]] || fail "--spot and --reserved exclude each other; drop one"
[[ ${#COMMAND[@]} -eq 0 ]] || fail "takes no command; drop what follows --"
[[ $valid_until_duration =~ ^([0-9]+[smhd])*$ ]] || fail "--valid-until-duration '$valid_until_duration' must be like 90m or 6h"

request=(gcloud compute tpus queued-resources create "$NAME" "${LOCATION[@]}" "--accelerator-type=$accelerator"
  "--runtime-version=${runtime_version:-$(runtime_of "$generation")}")
if ((slices == 1)); then
  request+=("--node-id=$NAME")
else
  request+=("--node-count=$slices" "--node-prefix=$NAME")
fi
if [[ -n $spot ]]; then request+=(--spot); fi
if [[ -n $reserved ]]; then request+=(--reserved); fi
if [[ -n $internal_ips ]]; then request+=(--internal-ips); fi
if [[ -n $valid_until_duration ]]; then request+=("--valid-until-duration=$valid_until_duration"); fi
if [[ -n $service_account ]]; then
  # Without this scope the account could not reach its buckets.
  request+=("--service-account=$service_account" --scopes=https://www.googleapis.com/auth/cloud-platform)
fi
if [[ -n $network ]]; then request+=("--network=$network"); fi
if [[ -n $subnetwork ]]; then request+=("--subnetwork=$subnetwork"); fi

state=$(queue_state ABSENT) || fail "cannot read the state of $NAME" 1
case $state in
  ABSENT) run "${request[@]}" ;;
  FAILED | SUSPENDED)
    [[ -n $replace ]] || fail "$NAME exists, but is $state; --replace deletes it and requests it again" 1
    delete_queue
    run "${request[@]}"
    ;;
  *) say "$NAME exists already: $state" ;;
esac

if [[ -n $wait ]]; then
  while :; do
    state=$(queue_state ACTIVE) || fail "cannot read the state of $NAME" 1
    case $state in
      ACTIVE) break ;;
      FAILED | SUSPENDED | ABSENT) fail "$NAME is $state; see status.sh $NAME" 1 ;;
    esac
    say "$NAME is $state"
    sleep "$poll"
  done
fi
