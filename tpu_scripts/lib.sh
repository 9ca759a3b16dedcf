# shellcheck shell=bash
# Shared by the scripts of this folder: options, checks, dry runs, and calls of gcloud that more than one of them makes.
# It is sourced, never executed. It works with bash 3.2 (macOS): no associative arrays, no mapfile.

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PROGRAM=${0##*/}
WORKER=diffusionlm_worker.sh # the name of worker.sh in the home directory of every host

exec 3>&1 # dry runs print here, also inside $(...)

# Options of all scripts; a script sets the defaults of its own options before it calls `parse`.
NAME='' zone=${CLOUDSDK_COMPUTE_ZONE:-} project=${CLOUDSDK_CORE_PROJECT:-} slices=1 dry_run=''
ENVIRONMENT=() FLAG_SETS=() COMMAND=()
GIVEN=() # the options as given, for scripts that pass them on

# fail MESSAGE [CODE]: prints one line on stderr and exits; code 2 is a user's mistake.
fail() {
  printf '%s: error: %s\n' "$PROGRAM" "$1" >&2
  exit "${2:-2}"
}

say() {
  printf '%s: %s\n' "$PROGRAM" "$*" >&2
}

# The comment at the top of a script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse "VALUE OPTIONS" "SWITCHES" "$@": sets the variable of each option (--valid-until-duration: valid_until_duration),
# NAME from the first plain word, ENVIRONMENT and FLAG_SETS from --env and --flags, COMMAND from what follows --.
parse() {
  local values=" ${1//$'\n'/ } " switches=" $2 dry-run " word option value
  shift 2
  while (($#)); do
    word=$1 && shift
    case $word in
      -h | --help) usage && exit 0 ;;
      --)
        COMMAND=("$@")
        return
        ;;
      --*)
        option=${word#--} && option=${option%%=*}
        if [[ $switches == *" $option "* ]]; then
          [[ $word != *=* ]] || fail "--$option takes no value; drop ${word#*=}"
          printf -v "${option//-/_}" 1
          GIVEN+=("--$option")
          continue
        fi
        [[ $values == *" $option "* ]] || fail "unknown option --$option; known: $(known_options)"
        if [[ $word == *=* ]]; then
          value=${word#*=}
        else
          (($#)) || fail "--$option needs a value; see $PROGRAM --help"
          value=$1 && shift
        fi
        GIVEN+=("--$option=$value")
        case $option in
          env) ENVIRONMENT+=("$value") ;;
          flags) FLAG_SETS+=("$value") ;;
          *) printf -v "${option//-/_}" %s "$value" ;;
        esac
        ;;
      -*) fail "unknown option $word; known: $(known_options)" ;;
      *)
        [[ -z $NAME ]] || fail "unexpected word '$word' after '$NAME'; a command of diffusionlm goes after --"
        NAME=$word
        ;;
    esac
  done
}

# pass_on "OPTIONS": sets WORDS to the given options that are among OPTIONS.
pass_on() {
  local word name options=" ${1//$'\n'/ } "
  WORDS=()
  for word in ${GIVEN[@]+"${GIVEN[@]}"}; do
    name=${word#--} && name=${name%%=*}
    if [[ $options == *" $name "* ]]; then WORDS+=("$word"); fi
  done
}

known_options() {
  usage | grep -oE -- '--[a-z][a-z-]+' | sort -u | tr '\n' ' '
}

# --- checks: each failure names the value and what is allowed

check_name() {
  [[ -n $NAME ]] || fail "give a name first: $(usage | sed -n 1p)"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "name '$NAME' must be 1 to 40 of a-z, 0-9 and -, start with a letter and not end with -"
}

# check_location: checks the form of the zone; gcloud knows which zones exist.
check_location() {
  [[ -n $zone ]] || fail "give --zone, or set CLOUDSDK_COMPUTE_ZONE; README.md lists the zones of each generation"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] || fail "zone '$zone' is not of the form us-west4-a"
  LOCATION=("--zone=$zone")
  if [[ -n $project ]]; then LOCATION+=("--project=$project"); fi
}

# check_count OPTION VALUE MINIMUM
check_count() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then fail "--$1 '$2' must be a whole number of at least $3"; fi
}

check_slices() {
  check_count slices "$slices" 1
}

# check_bucket OPTION VALUE [MESSAGE]
check_bucket() {
  [[ $2 =~ ^gs://[a-z0-9][-a-z0-9_.]+(/[^[:space:]]*)?$ ]] ||
    fail "--$1 '$2' must be on a bucket, like ${3:-gs://my-bucket/data}"
}

check_workdir() {
  check_bucket workdir "$workdir" "gs://my-bucket/runs/llada: the disks of TPU hosts are deleted with them"
  workdir=${workdir%/}
}

check_one_of() { # OPTION VALUE CHOICES
  [[ " $3 " == *" $2 "* ]] || fail "--$1 '$2' must be one of: $3"
}

check_environment() {
  local pair
  for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env '$pair' is not of the form NAME=VALUE"
    [[ $pair != *$'\n'* ]] || fail "--env ${pair%%=*} must be one line"
  done
}

# check_command: checks what follows --. The run directory is an option of the script, which needs it too.
check_command() {
  local word
  [[ ${#COMMAND[@]} -gt 0 ]] || fail "give the command after --, for example: -- train smdm_170m --data.path gs://..."
  case "${COMMAND[0]} ${COMMAND[1]:-}" in
    "train "[!-]*) ;;
    "sweep run") [[ ${COMMAND[2]:-} == [!-]* ]] || fail "name the sweep: -- sweep run SWEEP" ;;
    *) fail "command '${COMMAND[*]}' must be one of: train EXPERIMENT [...], sweep run SWEEP [...]" ;;
  esac
  for word in "${COMMAND[@]}"; do
    [[ $word != --workdir && $word != --workdir=* ]] || fail "give --workdir before the --, not after it"
    [[ $word != *$'\n'* ]] || fail "a word of the command has a line break: '${word%%$'\n'*}...'"
  done
}

# --- accelerator types. v4 and v5p count TensorCores, two per chip; v5e and v6e count chips.
# Sizes: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (November 2026).

# resolve_type TYPE: sets accelerator (gcloud's and XPK's name) and generation.
resolve_type() {
  local size=${1##*-} sizes="1 4 8 16 32 64 128 256" largest=8192
  generation=${1%-*} accelerator=$1
  [[ $1 =~ ^[a-z0-9]+-[1-9][0-9]{0,4}$ ]] || generation=unknown
  # shellcheck disable=SC2034 # `accelerator` is read by the scripts
  case $generation in
    v5e | v5litepod) generation=v5e accelerator=v5litepod-$size ;;
    v6e) ;;
    v4 | v5p)
      sizes="8, 16, 32, 64 or a multiple of 128 up to"
      if [[ $generation == v5p ]]; then largest=12288; fi
      [[ " 8 16 32 64 " == *" $size "* ]] || ((size >= 128 && size % 128 == 0 && size <= largest)) ||
        fail "--type '$1': sizes of $generation are $sizes $largest (TensorCores, two per chip)"
      return
      ;;
    tpu7x)
      ((size % 2 == 0)) || fail "--type '$1': sizes of tpu7x are even (TensorCores, two per chip)"
      return
      ;;
    *) fail "--type '$1' must be v5e-N or v6e-N (N chips), v4-N or v5p-N (N TensorCores), for example v5e-256" ;;
  esac
  [[ " $sizes " == *" $size "* ]] || fail "--type '$1': sizes of $generation are $sizes (chips)"
}

# runtime_of GENERATION: prints the software of its TPU VMs: https://docs.cloud.google.com/tpu/docs/runtimes
runtime_of() {
  case $1 in
    v6e) echo v2-alpha-tpuv6e ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v5e) echo v2-alpha-tpuv5-lite ;;
    v4) echo tpu-ubuntu2204-base ;;
  esac
}

# --- compiler flags

# flags_of SET GENERATION: prints the flags of a set of xla_flags.conf on one line; GENERATION '' is not checked.
flags_of() {
  local file=$HERE/xla_flags.conf name generations flag found=''
  while read -r name generations flag; do
    if [[ -z $name || $name == '#'* || $name != "$1" ]]; then continue; fi
    [[ -z $2 || ",$generations," == *",$2,"* ]] || fail "--flags '$1' is for $generations, not for $2"
    found="$found${found:+ }$flag"
  done <"$file"
  [[ -n $found ]] || fail "--flags '$1' is not in xla_flags.conf; sets: $(flag_set_names)"
  printf %s "$found"
}

flag_set_names() {
  awk '!/^#/ && NF { if (!seen[$1]++) printf "%s%s", separator, $1; separator = " " }' "$HERE/xla_flags.conf"
}

# compiler_flags GENERATION: turns FLAG_SETS into one LIBTPU_INIT_ARGS of ENVIRONMENT.
compiler_flags() {
  local set all='' found
  for set in ${FLAG_SETS[@]+"${FLAG_SETS[@]}"}; do
    found=$(flags_of "$set" "$1") || exit 2
    all="$all${all:+ }$found"
  done
  if [[ -n $all ]]; then ENVIRONMENT+=("LIBTPU_INIT_ARGS=$all"); fi
}

# --- commands

# quote WORD...: prints the words quoted for any POSIX shell.
quote() {
  local word separator='' quoted="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "%s'%s'" "$separator" "${word//\'/$quoted}" ;;
      *) printf '%s%s' "$separator" "$word" ;;
    esac
    separator=' '
  done
}

# run COMMAND...: runs it; in a dry run, prints it.
run() {
  if [[ -n $dry_run ]]; then
    quote "$@" >&3
    echo >&3
  else
    "$@"
  fi
}

# worker_words START...: sets WORDS to the command line that makes a host run COMMAND; START calls worker.sh.
worker_words() {
  local pair
  WORDS=("$@")
  for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do WORDS+=(--env "$pair"); done
  # Only training writes DONE.json at its end; a sweep is done when its exit code says so.
  if [[ ${COMMAND[0]} == train ]]; then WORDS+=(--done "$workdir/DONE.json"); fi
  WORDS+=(-- "${COMMAND[@]}" --workdir "$workdir")
}

# nodes: prints the TPU VMs of a queued resource, one per slice; gcloud appends numbers to the prefix.
nodes() {
  local i
  if ((slices == 1)); then
    echo "$NAME"
  else
    for ((i = 0; i < slices; i++)); do echo "$NAME-$i"; done
  fi
}

# on_hosts WORKERS WORD...: runs the command on the hosts of all slices at once; fails if it fails on one of them.
on_hosts() {
  local workers=$1 node pids=() pid status=0
  shift
  for node in $(nodes); do
    if [[ -n $dry_run ]] || ((slices == 1)); then
      run gcloud compute tpus tpu-vm ssh "$node" "${LOCATION[@]}" "--worker=$workers" "--command=$(quote "$@")" || status=1
    else
      gcloud compute tpus tpu-vm ssh "$node" "${LOCATION[@]}" "--worker=$workers" "--command=$(quote "$@")" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || status=1; done
  return "$status"
}

# to_hosts FILE NAME: copies a file into the home directory of every host.
to_hosts() {
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$1" "$node:$2" "${LOCATION[@]}" --worker=all
  done
}

# queue_state ASSUMED: prints the state of the queued resource NAME, or ABSENT; in a dry run, ASSUMED. Fails if the state
# cannot be read.
queue_state() {
  local command=(gcloud compute tpus queued-resources describe "$NAME" "${LOCATION[@]}" '--format=value(state.state)')
  local errors status=0
  if [[ -n $dry_run ]]; then
    run "${command[@]}"
    echo "$1"
    return
  fi
  errors=$(mktemp)
  "${command[@]}" 2>"$errors" || status=$?
  if ((status)) && grep -qiE 'NOT_FOUND|not found' "$errors"; then
    echo ABSENT
    status=0
  elif ((status)); then
    cat "$errors" >&2
  fi
  rm -f "$errors"
  return "$status"
}

# worker_states: prints one line per host, "HOST STATE CODE" (see worker.sh); fails unless every host answers.
worker_states() {
  local answers
  answers=$(on_hosts all bash "$WORKER" state) || return 1
  if [[ -z $dry_run ]]; then grep -E '^[^ ]+ (idle|running|finished|stopped|failed) [^ ]+$' <<<"$answers"; fi
}

# delete_queue: deletes the queued resource and its TPU VMs.
delete_queue() {
  run gcloud compute tpus queued-resources delete "$NAME" "${LOCATION[@]}" --force --quiet
}
