"""Signals that stop a run: nested contexts, a closed stderr, and threads."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from support import child_processes
from support.slow_cases import slow

from diffusionlm.ownership.claims import owned
from diffusionlm.ownership.lease import release_all
from diffusionlm.parallel import signals


def test_a_second_ctrl_c_does_not_wait(capfd):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), signals.stop_signals() as outer, signals.stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.is_set() and outer.is_set()
        assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1  # said once, before the step has ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == ""
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("broken", ["none", "no file", "closed", "no reader"])
def test_a_stop_is_noted_where_nobody_can_be_told(monkeypatch, broken):
    reader, writer = os.pipe()
    pipe = os.fdopen(writer, "w")
    os.close(reader)
    if broken == "closed":
        pipe.close()
    stream = {"none": None, "no file": object()}.get(broken, pipe)
    monkeypatch.setattr(sys, "stderr", stream)
    with signals.stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.is_set()
    pipe.close()


def test_in_a_thread_signals_are_left_to_the_program():
    before, seen = signal.getsignal(signal.SIGINT), []

    def body():
        with signals.stop_signals() as stopped:
            seen.append((signal.getsignal(signal.SIGINT), stopped.is_set()))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


# A program whose main thread hangs in code that no signal interrupts: it locks a mutex twice. Its other thread says
# "hangs" once the main thread has been asleep at every look.
HANGS = """
import contextlib, ctypes, os, pathlib, signal, sys, threading, time
from diffusionlm.parallel import signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
signals.GRACE_SECONDS = 0.2
signals.never_deaf()
main = threading.main_thread().native_id
lock = ctypes.create_string_buffer(64)
libc = ctypes.CDLL(None)

def watch():
    asleep = 0
    while asleep < 20:
        state = pathlib.Path(f"/proc/self/task/{main}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.01)
    print("hangs", flush=True)

with signals.stop_signals() if sys.argv[1] != "none" else contextlib.nullcontext() as request:
    if request:
        request.starting = sys.argv[1] == "starting"
    libc.pthread_mutex_lock(lock)
    threading.Thread(target=watch, daemon=True).start()
    libc.pthread_mutex_lock(lock)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc whether the main thread hangs")
@pytest.mark.parametrize(
    ("run", "sent", "said"),
    [
        ("none", [signal.SIGINT], "interrupted"),
        ("starting", [signal.SIGINT], "stopped before the first step"),
        slow(("starting", [signal.SIGTERM], "stopped before the first step")),
        slow(("training", [signal.SIGINT, signal.SIGINT], "the next signal stops at once")),
        ("training", [signal.SIGTERM, signal.SIGTERM], "the next signal stops at once"),
    ],
)
def test_a_signal_ends_a_process_that_cannot_hear_it(run, sent, said):
    """A run that may have steps to save ends at the second signal."""
    command = [sys.executable, "-c", HANGS, run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with child_processes.at_most(60, [process]):
            assert process.stdout.readline() == "hangs\n"
            for number in sent[:-1]:
                process.send_signal(number)
                while said not in process.stderr.readline():
                    pass
            process.send_signal(sent[-1])
            errors = process.stderr.read()
    assert process.returncode == 128 + sent[-1], errors
    assert len(sent) == 2 or said in errors


def test_a_process_that_ends_so_gives_back_its_leases(tmp_path):
    with owned(tmp_path / "owner.json", "it", "") as lease:
        release_all(10.0)
        assert lease.lost and not (tmp_path / "owner.json").exists()
    release_all(10.0)  # there is none


def test_who_hears_a_signal_is_left_alone():
    """A loop that checks its event goes on for as long as it likes: it is not starting."""
    program = HANGS.split("libc.pthread_mutex_lock")[0] + (
        "    os.kill(os.getpid(), 15)\n"
        "    end = time.monotonic() + 1\n"
        "    while time.monotonic() < end: pass\n"
        "    print('saved', request.is_set())\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, "training"], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "saved True\n"), ran.stderr


def test_a_signal_that_a_run_has_heard_does_not_end_the_one_that_begins_next():
    program = HANGS.split("with signals.stop_signals()")[0] + (
        "with signals.stop_signals() as request:\n"
        "    request.starting = False\n"
        "    os.kill(os.getpid(), 15)\n"
        "    assert request.wait(10)\n"
        "with signals.stop_signals() as request:\n"
        "    request.starting = True\n"
        "    end = time.monotonic() + 1\n"
        "    while time.monotonic() < end: pass\n"
        "    print('began', request.is_set())\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "began False\n"), ran.stderr
