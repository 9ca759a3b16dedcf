#!/usr/bin/env bash
# xpk_run.sh NAME --cluster CLUSTER --type TYPE --image IMAGE --workdir gs://BUCKET/RUN [options] -- train EXPERIMENT [...]
#
# Creates one run as an XPK workload on a GKE cluster; Kueue starts it when there is room. Interrupted pods are
# restarted, and the run resumes from its newest checkpoint.
#
#   --cluster CLUSTER    created with `xpk cluster create`
#   --type TYPE          v5e-256, v6e-64, tpu7x-128 (one of the cluster's node pools); --slices N, for Multislice
#   --image IMAGE        the image that build_image.sh pushed
#   --workdir --flags --env      as for launch.sh
#   --priority LEVEL     very-low, low, medium, high or very-high (medium)
#   --max-restarts N     restarts of the whole workload, preemptions included (100)
#   --grace SECONDS      between SIGTERM and SIGKILL (120), if the node itself stays that long
#   --spot               use Spot VMs, on clusters that create node pools on demand
#   --zone ZONE --project PROJECT
#   --dry-run            print the commands without running them
#
# An existing workload of this name is left alone.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cluster='' type='' image='' workdir='' priority=medium max_restarts=100 grace=120 spot=''
parse "cluster type image workdir flags env priority max-restarts grace zone project slices" "spot" "$@"
check_name
[[ -n $cluster ]] || fail "give --cluster; xpk cluster list shows them"
[[ $cluster =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--cluster '$cluster' must be 1 to 40 of a-z, 0-9 and -, start with a letter and not end with -"
[[ -n $type ]] || fail "give --type, for example v5e-256"
resolve_type "$type"
check_location
check_slices
[[ $image =~ ^[a-z0-9][^[:space:]]+[:@][^[:space:]/]+$ ]] || fail "--image '$image' must be a name with a tag, as build_image.sh prints it"
check_workdir
check_environment
check_command
check_one_of priority "$priority" "very-low low medium high very-high"
check_count max-restarts "$max_restarts" 0
check_count grace "$grace" 1
compiler_flags "$generation"

# XPK does not support v5litepod-1 and -4, which are parts of a host.
[[ $accelerator != v5litepod-[14] ]] || fail "--type '$type': XPK starts at v5e-8"
# `exec`, because XPK sends SIGTERM to the shell around this command.
worker_words exec diffusionlm_worker run
request=(xpk workload create "--workload=$NAME" "--cluster=$cluster" "${LOCATION[@]}" "--tpu-type=$accelerator"
  "--num-slices=$slices" "--docker-image=$image" "--priority=$priority" "--max-restarts=$max_restarts"
  # A host exits with 1 if it lost a peer; a mistake (2) ends the workload.
  --restart-on-exit-codes=1 "--termination-grace-period-seconds=$grace" "--command=$(quote "${WORDS[@]}")")
if [[ -n $spot ]]; then request+=(--spot); fi

known=(xpk workload list "--cluster=$cluster" "${LOCATION[@]}" "--filter-by-job=^$NAME\$")
if [[ -n $dry_run ]]; then
  run "${known[@]}"
else
  found=$("${known[@]}") || fail "xpk cannot list the workloads of $cluster" 1
  if grep -qE "^$NAME([[:space:]]|\$)" <<<"$found"; then
    say "$NAME exists already; xpk workload delete --workload=$NAME --cluster=$cluster --zone=$zone removes it"
    exit 0
  fi
fi
run "${request[@]}"
