#!/usr/bin/env bash
# worker.sh VERB [...]: runs on every TPU host, where setup.sh copies it to, and in the image; one command at a time.
#
#   install --python VERSION --uv VERSION (--package SPEC [--commit SUM] | --bundle FILE --commit SHA)
#                    a Python environment with diffusionlm[tpu] and gcsfs; nothing to do where it is there already
#   chips            waits for the hosts of all slices, and prints how many chips they have together
#   start [--env NAME=VALUE]... [--done FILE] -- ARGUMENTS...     `run` in the background, past the end of the session
#   run   [--env NAME=VALUE]... [--done FILE] -- ARGUMENTS...     diffusionlm ARGUMENTS...
#   stop [--timeout SECONDS] [--kill] [--again]     SIGTERM, so that it saves, and wait; with --kill, SIGKILL after the
#                    timeout; with --again, it is not called stopped, because it is to be started anew
#   state            prints "HOST STATE CODE", STATE one of idle, running, finished, stopped, failed
#   log [--lines N] [--follow]            the end of its output
#
# `run` exits with the code of diffusionlm, but with 42 if it was told to stop, or ended well without FILE being there:
# not done, start it again. XPK restarts such a workload. 2 is a user's mistake, 3: a command is running already.

set -uo pipefail

STATE_DIR=${DIFFUSIONLM_WORKER_DIR:-$HOME/diffusionlm_run}
RESTART=42
DONE_WAIT=${DIFFUSIONLM_DONE_WAIT:-60} # seconds that the first host gets to write FILE after the others are through
SELF=${BASH_SOURCE[0]}
export PATH="$STATE_DIR/venv/bin:$STATE_DIR/bin:$PATH"

fail() {
  echo "worker.sh on $(hostname): error: $1" >&2
  exit "${2:-2}"
}

# A shared lock, and `run` waits a little for its own: who only asks is in nobody's way.
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
  local wanted="$python $package $commit" source=("$package")
  if [[ -x $STATE_DIR/venv/bin/diffusionlm && $(cat "$STATE_DIR/installed" 2>/dev/null) == "$wanted" ]]; then
    echo "$(hostname) has it already: $wanted"
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
  if [[ $package == *.whl ]]; then source=("diffusionlm[tpu] @ file://$PWD/$package"); fi
  uv venv --quiet --python "$python" "$STATE_DIR/venv"
  uv pip install --quiet --python "$STATE_DIR/venv/bin/python" "${source[@]}" gcsfs
  diffusionlm --version
  echo "$wanted" >"$STATE_DIR/installed"
}

chips() {
  if is_running; then fail "a command is running, and has the chips" 3; fi
  JAX_PLATFORMS=tpu,cpu python - <<'PYTHON'
import jax

jax.distributed.initialize()
print(f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} devices")
PYTHON
}

start() {
  if is_running; then fail "a command is running already; stop it first" 3; fi
  # Of an earlier command: `state` must not take its end for that of this one.
  rm -f "$STATE_DIR/exit_code" "$STATE_DIR/stopped"
  # What was before is kept once, so that the log of a crash outlives the restart.
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
  # The lock is held by diffusionlm too: while it lives the chips are taken, whatever became of this shell.
  exec 9>"$STATE_DIR/lock"
  flock --timeout 1 9 || fail "a command is running already; stop it first" 3
  rm -f "$STATE_DIR/exit_code" "$STATE_DIR/stopped"
  local told='' interrupted=1 status=0 last
  # Without TPUs it fails, rather than train on the processor for a day.
  JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} diffusionlm "$@" &
  CHILD=$!
  echo "$$ $CHILD" >"$STATE_DIR/pids"
  trap 'told=1 interrupted=1; kill -TERM "$CHILD" 2>/dev/null' TERM INT HUP
  while [[ -n $interrupted ]]; do # a signal ends `wait`, not the child
    interrupted=''
    wait "$CHILD"
    last=$?
    if ((last != 127)); then status=$last; fi
  done
  if ((status == 0)) && [[ -n $finish ]]; then
    if ! is_there "$finish" "$([[ -n $told ]] || echo "$DONE_WAIT")"; then status=$RESTART; fi
  elif [[ -n $told ]]; then
    status=$RESTART
  fi
  echo "$status" >"$STATE_DIR/exit_code"
  echo "worker.sh: $(date -u +%FT%TZ) diffusionlm ended; exit code $status"
  exit "$status"
}

# is_there FILE [SECONDS]: whether a file, which may be on a bucket, is there within so many seconds.
is_there() {
  python - "$1" "${2:-0}" <<'PYTHON'
import sys
import time

from etils import epath

path, deadline = epath.Path(sys.argv[1]), time.monotonic() + float(sys.argv[2] or 0)
while not (found := path.exists()) and time.monotonic() < deadline:
    time.sleep(2)
sys.exit(not found)
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
    if is_running; then fail "it still runs after $timeout s; --kill ends it without saving" 1; fi
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
  elif [[ -e $STATE_DIR/pids ]]; then # it ended with this shell: killed, or the host was restarted
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
  [[ -e $STATE_DIR/log ]] || fail "nothing was started here" 1
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
