"""A process is known by more than its number, which another may get later."""

import subprocess
import sys

import msgspec

from diffusionlm.ownership import process_identity
from diffusionlm.ownership.process_identity import has_ended, this_process


def test_a_number_that_another_process_got_later_is_not_its_owner():
    alive = this_process()
    assert not has_ended(alive)
    assert has_ended(msgspec.structs.replace(alive, started="1"))
    assert not has_ended(msgspec.structs.replace(alive, started="1", host="another")), "nothing is known of it"
    assert not has_ended(msgspec.structs.replace(alive, started="1", machine="another")), "nor of another boot"


def test_without_proc_a_process_is_known_by_its_number(monkeypatch):
    monkeypatch.setattr(process_identity, "_stat", lambda pid: ("", 0, ""))
    monkeypatch.setattr(process_identity, "_machine", lambda: "")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert not has_ended(this_process())
    assert has_ended(msgspec.structs.replace(this_process(), pid=process.pid))
