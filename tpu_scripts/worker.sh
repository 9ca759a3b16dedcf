#!/usr/bin/env bash
# worker.sh VERB [...]: runs on every TPU host, where setup.sh copies it, and in the image; one command at a time.
#
#   install --python VERSION --uv VERSION (--package SPEC [--commit SUM] | --bundle FILE --commit SHA)
#                    installs a Python environment with diffusionlm-jax[tpu] and gcsfs, unless it exists
#   chips            waits for the hosts of all slices and prints the number of their chips
#   start [--env NAME=VALUE]... [--done FILE] -- ARGUMENTS...     `run` in the background, beyond the session
#   run   [--env NAME=VALUE]... [--done FILE] -- ARGUMENTS...     diffusionlm ARGUMENTS...
#   stop [--timeout SECONDS] [--kill] [--again]     sends SIGTERM, so that it saves, and waits; with --kill, SIGKILL after
#                    the timeout; with --again, its state is not `stopped`, because it will be restarted
#   state            prints "HOST STATE CODE", STATE one of idle, running, finished, stopped, failed
#   log [--lines N] [--follow]            prints the end of its output
#
# `run` exits with the code of diffusionlm, but with 42 if it was stopped, or succeeded although FILE does not exist: the
# run is not done and must be restarted, which XPK does. 2 is a user's mistake; 3 means that a command is running already.

set -uo pipefail

STATE_DIR=${DIFFUSIONLM_WORKER_DIR:-$HOME/diffusionlm_run}
RESTART=42
DONE_WAIT=${DIFFUSIONLM_DONE_WAIT:-60} # seconds for the first host to write FILE after the others have ended
SELF=${BASH_SOURCE[0]}
export PATH="$STATE_DIR/venv/bin:$STATE_DIR/bin:$PATH"

fail() {
  echo "worker.sh on $(hostname): error: $1" >&2
  exit "${2:-2}"
}

# A check takes a shared lock, and `run` waits a little for its exclusive one, so that checks do not get in its way.
is_running() {
  [[ -e $STATE_DIR/lock ]] && ! flock --shared --nonblock "$STATE_DIR/lock" true
}

install() {
  local python='' uv='' package='' bundle='' commit=''
  while (($#)); do
    case $1 in
      --python) python=$2 ;;
      --uv) uv=$2 ;;
      --package) package=$2 ;;
      --bundle) bundle=$2 ;;
      --commit) commit=$2 ;;
      *) fail "unknown option $1" ;;
    esac
    shift 2
  done
  local requested="$python $package $commit" source=("$package")
  if [[ -x $STATE_DIR/venv/bin/diffusionlm && $(cat "$STATE_DIR/installed" 2>/dev/null) == "$requested" ]]; then
    echo "$(hostname) has it already: $requested"
    return
  fi
  if is_running; then fail "a command is running; stop it before another version is installed" 3; fi
  set -e
  rm -rf "$STATE_DIR/installed" "$STATE_DIR/venv"
  if [[ ! -x $STATE_DIR/bin/uv ]]; then
    curl -LsSf "https://astral.sh/uv/$uv/install.sh" | env UV_UNMANAGED_INSTALL="$STATE_DIR/bin" sh
  fi
  if [[ -n $bundle ]]; then
    rm -rf "$STATE_DIR/tree"
    git clone --quiet "$bundle" "$STATE_DIR/tree"
    git -C "$STATE_DIR/tree" checkout --quiet "$commit"
    source=(--editable "$STATE_DIR/tree[tpu]") # editable, so that environment.json finds the commit
  fi
  if [[ $package == *.whl ]]; then source=("diffusionlm-jax[tpu] @ file://$PWD/$package"); fi
  uv venv --quiet --python "$python" "$STATE_DIR/venv"
  uv pip install --quiet --python "$STATE_DIR/venv/bin/python" "${source[@]}" gcsfs
  diffusionlm --version
  echo "$requested" >"$STATE_DIR/installed"
}

chips() {
  if is_running; then fail "a command is running and uses the chips" 3; fi
  JAX_PLATFORMS=tpu,cpu python - <<'PYTHON'
import jax

jax.distributed.initialize()
print(f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} devices")
PYTHON
}

start() {
  if is_running; then fail "a command is running already; stop it first" 3; fi
  # These are of an earlier command, whose end `state` must not report for this one.
  rm -f "$STATE_DIR/exit_code" "$STATE_DIR/stopped"
  # Keep one earlier log, so that the log of a crash survives the restart.
  if [[ -e $STATE_DIR/log ]]; then mv "$STATE_DIR/log" "$STATE_DIR/log.before"; fi
  setsid nohup bash "$SELF" run "$@" >"$STATE_DIR/log" 2>&1 </dev/null &
  local i
  for ((i = 0; i < 50; i++)); do
    if [[ -e $STATE_DIR/exit_code ]] || is_running; then
      state
      return
    fi
    sleep 0.1
  done
  tail -n 5 "$STATE_DIR/log" >&2
  fail "it did not start" 1
}

run() {
  local finish=''
  while (($#)); do
    case $1 in
      --env) export "${2?}" ;;
      --done) finish=$2 ;;
      --) shift && break ;;
      *) fail "unknown option $1" ;;
    esac
    shift 2
  done
  # diffusionlm inherits the lock: while it runs, the chips are in use, even if this shell has ended.
  exec 9>"$STATE_DIR/lock"
  flock --timeout 1 9 || fail "a command is running already; stop it first" 3
  rm -f "$STATE_DIR/exit_code" "$STATE_DIR/stopped"
  local stopping='' interrupted=1 status=0 last
  # Without TPUs it fails instead of training on the CPU for a day.
  JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} diffusionlm "$@" &
  CHILD=$!
  echo "$$ $CHILD" >"$STATE_DIR/pids"
  trap 'stopping=1 interrupted=1; kill -TERM "$CHILD" 2>/dev/null' TERM INT HUP
  while [[ -n $interrupted ]]; do # a signal ends `wait`, not the child
    interrupted=''
    wait "$CHILD"
    last=$?
    if ((last != 127)); then status=$last; fi
  done
  if ((status == 0)) && [[ -n $finish ]]; then
    if ! exists "$finish" "$([[ -n $stopping ]] || echo "$DONE_WAIT")"; then status=$RESTART; fi
  elif [[ -n $stopping ]]; then
    status=$RESTART
  fi
  echo "$status" >"$STATE_DIR/exit_code"
  echo "worker.sh: $(date -u +%FT%TZ) diffusionlm ended; exit code $status"
  exit "$status"
}

# exists FILE [SECONDS]: succeeds if a file, which may be on a bucket, exists within so many seconds.
exists() {
  python - "$1" "${2:-0}" <<'PYTHON'
import sys
import time

from etils import epath

path, deadline = epath.Path(sys.argv[1]), time.monotonic() + float(sys.argv[2] or 0)
while not (exists := path.exists()) and time.monotonic() < deadline:
    time.sleep(2)
sys.exit(not exists)
PYTHON
}

stop() {
  local timeout=600 kill='' again='' i shell child
  while (($#)); do
    case $1 in
      --timeout) timeout=$2 && shift 2 ;;
      --kill) kill=1 && shift ;;
      --again) again=1 && shift ;;
      *) fail "unknown option $1" ;;
    esac
  done
  if is_running; then
    [[ -n $again ]] || touch "$STATE_DIR/stopped"
    read -r shell child <"$STATE_DIR/pids"
    kill -TERM "$shell" 2>/dev/null || kill -TERM "$child" 2>/dev/null
    for ((i = 0; i < timeout * 10; i++)); do
      is_running || break
      sleep 0.1
    done
    if is_running && [[ -n $kill ]]; then
      kill -KILL "$child" 2>/dev/null
      for ((i = 0; i < 50; i++)); do
        is_running || break
        sleep 0.1
      done
    fi
    if is_running; then fail "it is still running after $timeout s; --kill ends it without saving" 1; fi
  fi
  state
}

state() {
  local code
  code=$(cat "$STATE_DIR/exit_code" 2>/dev/null)
  if is_running; then
    echo "$(hostname) running -"
  elif [[ -e $STATE_DIR/stopped && $code != 0 ]]; then
    echo "$(hostname) stopped ${code:--}"
  elif [[ $code == 0 ]]; then
    echo "$(hostname) finished 0"
  elif [[ -n $code ]]; then
    echo "$(hostname) failed $code"
  elif [[ -e $STATE_DIR/pids ]]; then # it ended together with its shell: killed, or the host was restarted
    echo "$(hostname) failed 137"
  else
    echo "$(hostname) idle -"
  fi
}

log() {
  local lines=50 follow=()
  while (($#)); do
    case $1 in
      --lines) lines=$2 && shift 2 ;;
      --follow) follow=(--follow) && shift ;;
      *) fail "unknown option $1" ;;
    esac
  done
  [[ -e $STATE_DIR/log ]] || fail "no command was started here" 1
  tail "${follow[@]}" --lines "$lines" "$STATE_DIR/log"
}

case ${1:-} in
  install | chips | start | run | stop | state | log)
    mkdir -p "$STATE_DIR"
    "$@"
    ;;
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" ;;
  *) fail "verb '${1:-}' must be one of: install chips start run stop state log" ;;
esac
