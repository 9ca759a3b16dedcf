"""Signals that stop a run: nested contexts, a closed stderr, and threads."""

import os
import signal
import sys
import threading

import pytest

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
