#!/usr/bin/env bash
# xpk_run.sh NAME --cluster CLUSTER --type TYPE --image IMAGE --workdir gs://BUCKET/RUN [options] -- train EXPERIMENT [...]
#
# One run as an XPK workload on a GKE cluster, which Kueue starts when there is room. Interrupted pods are started again,
# and the run goes on from its newest checkpoint.
#
#   --cluster CLUSTER    made with `xpk cluster create`
#   --type TYPE          v5e-256, v6e-64, tpu7x-128 (as of the cluster's node pools); --slices N, for Multislice
#   --image IMAGE        what build_image.sh pushed
#   --workdir --flags --env      as for launch.sh
#   --priority LEVEL     very-low, low, medium, high or very-high (medium)
#   --max-restarts N     of the whole workload (100), preemptions included
#   --grace SECONDS      between SIGTERM and SIGKILL (120), as far as the node itself stays
#   --spot               only for clusters that make node pools on demand: use Spot VMs
#   --zone ZONE --project PROJECT
#   --dry-run            print the commands, run none
#
# If a workload of that name is there, nothing happens.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cluster='' type='' image='' workdir='' priority=medium max_restarts=100 grace=120 spot=''
parse "cluster type image workdir flags env priority max-restarts grace zone project slices" "spot" "$@"
check_name
[[ -n $cluster ]] || fail "give --cluster; xpk cluster list names them"
[[ $cluster =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--cluster '$cluster' must be of a-z, 0-9 and -"
[[ -n $type ]] || fail "give --type, for instance v5e-256"
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

# XPK knows no v5litepod-1 and -4, which are parts of a host.
[[ $accelerator != v5litepod-[14] ]] || fail "--type '$type': XPK starts at v5e-8"
# `exec`, because XPK sends SIGTERM to the shell around this command.
worker_words exec diffusionlm_worker run
request=(xpk workload create "--workload=$NAME" "--cluster=$cluster" "${LOCATION[@]}" "--tpu-type=$accelerator"
  "--num-slices=$slices" "--docker-image=$image" "--priority=$priority" "--max-restarts=$max_restarts"
  # 1 is how a host ends whose peer was lost; a mistake (2) ends the workload.
  --restart-on-exit-codes=1 "--termination-grace-period-seconds=$grace" "--command=$(quote "${WORDS[@]}")")
if [[ -n $spot ]]; then request+=(--spot); fi

known=(xpk workload list "--cluster=$cluster" "${LOCATION[@]}" "--filter-by-job=^$NAME\$")
if [[ -n $dry_run ]]; then
  run "${known[@]}"
else
  found=$("${known[@]}") || fail "xpk cannot list the workloads of $cluster" 1
  if grep -qE "^$NAME([[:space:]]|\$)" <<<"$found"; then
    say "$NAME is there already; xpk workload delete --workload=$NAME --cluster=$cluster --zone=$zone removes it"
    exit 0
  fi
fi
run "${request[@]}"
