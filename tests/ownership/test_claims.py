"""A directory has one owner: others are told who it is, and succeed it when it has died."""

import contextlib
import errno
import json
import logging
import re
import signal
import subprocess
import sys
import time

import msgspec
import pytest
from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.ownership import claims
from diffusionlm.ownership.claims import Claimant, Owner, owned, owned_output, whole_directory
from diffusionlm.ownership.lease import Lease, LeaseLost
from diffusionlm.ownership.process_identity import Process, this_process

# What another process does: it owns the place, says so, and waits for the end of its input.
HOLDER = """
import sys
from diffusionlm.ownership.claims import owned
with owned(sys.argv[1], "the directory", "use another"):
    print("owned", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(place):
    command = [sys.executable, "-c", HOLDER, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "owned\n"
        try:
            yield process
        finally:
            process.kill()


class Elsewhere:
    """A process on another machine, whose lease is renewed `renewals` times while others look at it."""

    def __init__(self, place, renewals=0, seconds=60.0, group=""):
        self.place, self.renewals, self.now = place, renewals, 0.0
        now = time.time()
        self.owner = Owner(
            holder="pod-7:12",
            process=Process(host="pod-7", pid=12, machine="m"),
            token="t",
            seconds=seconds,
            time=now,
            since=now,
            group=group,
        )
        self.write()

    def write(self):
        self.place.write_bytes(msgspec.json.encode(self.owner))

    def sleep(self, seconds):
        self.now += seconds
        if self.renewals and self.now % 15 == 0:
            self.renewals -= 1
            self.owner = msgspec.structs.replace(self.owner, time=self.owner.time + 15)
            self.write()

    def claimant(self, **options):
        place = epath.Path(self.place)
        return Claimant(place, "dir", "use another", clock=lambda: self.now, sleep=self.sleep, **options)


def test_a_second_process_is_told_who_has_it_since_when_and_what_to_do(tmp_path):
    place = tmp_path / "owner.json"
    with holder(place) as process:
        with pytest.raises(UserError) as refusal, owned(place, "the directory d", "use another --workdir"):
            pass
    host = this_process().host
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(
        rf"the directory d is in use by process {process.pid} on {re.escape(host)} since {since}; end it "
        rf"\(kill {process.pid}\), or use another --workdir; if that process does something else by now, delete "
        rf"{re.escape(str(place))}",
        str(refusal.value),
    )


@pytest.mark.parametrize("reaped", [False, True])
def test_a_process_that_was_killed_is_succeeded_at_once(tmp_path, reaped, monkeypatch):
    """It may still be a zombie, of which its parent has not asked."""
    monkeypatch.setattr(Claimant, "_announce", None)  # nobody waits
    place = tmp_path / "owner.json"
    with holder(place) as process:
        process.send_signal(signal.SIGKILL)
        if reaped:
            process.wait()
        else:
            process.stdout.read()  # its end: the kernel has closed the files of the process
        with owned(place, "dir", "") as lease:
            assert lease
    assert not place.exists()


def test_a_silent_process_elsewhere_is_succeeded_after_its_term(tmp_path, caplog):
    other = Elsewhere(tmp_path / "owner.json", seconds=60.0)
    lease = other.claimant().claim()
    assert 60 < other.now <= 62
    lease.confirm()
    (line,) = caplog.messages
    assert line.startswith("dir is in use by process 12 on pod-7 since ")
    assert line.endswith("; waiting until that process has been silent for 60 s")


def test_a_living_process_elsewhere_is_not_succeeded(tmp_path):
    other = Elsewhere(tmp_path / "owner.json", renewals=1)
    with pytest.raises(UserError, match=r"pod-7.*; end it there \(if it has died, .* once 60 s have passed\), or use"):
        other.claimant().claim()
    assert other.now == 15, "one sign of life is enough"


def test_who_waits_gets_it_when_its_owner_ends(tmp_path):
    other = Elsewhere(tmp_path / "owner.json", renewals=5)
    lease = other.claimant(wait=True).claim()
    assert other.now > 5 * 15 + 60
    lease.confirm()


def test_processes_of_one_group_succeed_each_other_at_once(tmp_path):
    other = Elsewhere(tmp_path / "owner.json", group="sweep")
    with pytest.raises(UserError, match="in use"):
        Elsewhere(tmp_path / "owner.json", renewals=3).claimant(group="sweep").claim()
    other.write()
    other.claimant(group="sweep").claim()
    assert other.now == 0


def test_an_owner_whose_lease_was_taken_is_told_by_whom(tmp_path):
    place = tmp_path / "owner.json"
    with owned(place, "dir", "") as lease:
        Elsewhere(place)
        for use in (lease.confirm, lease.check):
            with pytest.raises(LeaseLost, match="dir was taken over by (pod-7:12|another process)"):
                use()
    assert json.loads(place.read_bytes())["holder"] == "pod-7:12", "it is not given back for the other"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"holder": 3}', '{"holder": "h", "seconds": -1}'])
def test_a_damaged_lease_is_named(tmp_path, text):
    (tmp_path / "owner.json").write_text(text)
    with (
        pytest.raises(UserError, match=r"the lease of dir is damaged \(.*delete .*owner\.json"),
        owned(tmp_path / "owner.json", "dir", ""),
    ):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(Claimant, "claim", fail)
    with owned(tmp_path / "owner.json", "dir", "") as lease:
        assert lease is None
    assert "nothing keeps a second process out of dir: " in caplog.text
    caplog.set_level(logging.ERROR)
    with whole_directory(tmp_path / "out") as partial:
        (tmp_path / ".out.partial-other").mkdir()
        assert partial.is_dir()
    with whole_directory(tmp_path / "out2"):
        assert (tmp_path / ".out.partial-other").is_dir(), "it may be alive"


def test_an_output_has_one_maker(tmp_path):
    abandoned = tmp_path / ".out.partial-1"
    abandoned.mkdir()
    with whole_directory(tmp_path / "out") as partial:
        assert not abandoned.exists()
        with pytest.raises(UserError, match="output=.*out is in use by process .*use another --output"):
            with whole_directory(tmp_path / "out"):
                pass
        with owned_output(tmp_path / "out2"):
            assert partial.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_was_taken_over_is_not_replaced(tmp_path):
    with pytest.raises(LeaseLost, match="taken over by pod-7:12"), whole_directory(tmp_path / "out"):
        Elsewhere(tmp_path / f".out.{claims.FILE}")
    assert not (tmp_path / "out").exists()


def test_a_lease_that_could_not_be_given_back_is_no_obstacle_to_its_process(tmp_path, monkeypatch):
    """The storage fails when the lease is given back; the same process may claim it again, another may not."""
    place = tmp_path / "owner.json"

    def fail():
        raise OSError("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "release", lambda self: fail())
        with claims.owned(place, "it", "wait"):
            with pytest.raises(UserError, match="in use"):
                claims.Claimant(epath.Path(place), "it", "wait").claim()
    assert place.exists()
    with claims.owned(place, "it", "wait") as again:
        assert again is not None
    assert not place.exists()


def test_a_lease_that_is_damaged_meanwhile_is_lost(tmp_path):
    place = tmp_path / "owner.json"
    with pytest.raises(LeaseLost, match="damaged"):
        with claims.owned(place, "it", "wait") as held:
            place.write_text("")
            held.confirm()


def test_an_output_may_have_the_longest_name(tmp_path):
    output = tmp_path / ("n" * 255)
    with claims.whole_directory(output) as directory:
        (directory / "file").write_text("whole")
    assert (output / "file").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["a dangling link", "a link to a directory", "a directory with a file", "a long name"])
def test_an_output_that_cannot_be_made_is_refused_before_the_work(kind, tmp_path):
    output, other = tmp_path / ("n" * 300 if kind == "a long name" else "out"), tmp_path / "other"
    if kind == "a directory with a file":
        output.mkdir()
        (output / "file").touch()
    elif "link" in kind:
        output.symlink_to(other)
    if kind == "a link to a directory":
        other.mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError), whole_directory(output, "0123456789abcdef"):
        pytest.fail("the work began")
    assert sorted(tmp_path.iterdir()) == before
