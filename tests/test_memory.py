"""What memory there is, and what is refused for want of it."""

from types import SimpleNamespace

import pytest

from diffusionlm import memory
from diffusionlm.errors import UserError

GIB = memory.GIB
CPU = SimpleNamespace(platform="cpu", device_kind="cpu", memory_stats=lambda: None)


def chip(limit):
    return SimpleNamespace(platform="gpu", device_kind="a chip", memory_stats=lambda: limit and {"bytes_limit": limit})


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return a function that writes the control groups of this process and the limits of groups, by file."""

    def write(membership, limits):
        monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
        monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
        (tmp_path / "membership").write_text(membership)
        for name, text in limits.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "12345\n"}, 12345),  # the group around it
        ("0::/a\n", {"a/memory.max": "12345\n", "memory.max": "99999\n"}, 12345),
        ("0::/\n", {"memory.max": "12345\n"}, 12345),  # a container sees its own group as the root
        ("0::/elsewhere\n", {"memory.max": "12345\n"}, 12345),  # or by a path that is not mounted there
        ("3:cpu:/x\n5:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "12345\n"}, 12345),  # version 1
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, None),  # its word for none
        ("0::/a\n", {"a/memory.max": "max\n"}, None),
    ],
)
def test_a_control_group_limits_the_host(groups, membership, limits, expected):
    groups(membership, limits)
    size, reason = memory.host_limit()
    if expected:
        assert (size, reason) == (expected, "its control group allows")
    else:
        assert size > 1e8 and reason != "its control group allows"


def test_devices_of_the_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "host_limit", lambda: (10 * GIB, "this machine has"))
    parts = {"parameters": 2 * GIB, "optimizer": 3 * GIB}
    memory.require_room("it", parts, [CPU] * 2, "use less")
    memory.require_room("it", parts, [], "use less")  # no device of this process
    with pytest.raises(UserError) as refusal:
        memory.require_room("training demo", parts, [CPU] * 3, "use less")
    assert str(refusal.value) == (
        "training demo needs at least 15 GiB of memory (parameters 6 GiB, optimizer 9 GiB), and this machine has "
        "10 GiB; use less"
    )
    monkeypatch.setattr(memory, "host_limit", lambda: None)
    memory.require_room("it", parts, [CPU] * 3, "use less")


def test_the_host_itself_has_memory(monkeypatch):
    monkeypatch.setattr(memory, "host_limit", lambda: (10 * GIB, "this machine has"))
    memory.require_room("it", {"parameters": 10 * GIB}, None, "use less")
    with pytest.raises(UserError, match=r"needs at least 11 GiB of memory \(parameters 11 GiB\), and this machine has"):
        memory.require_room("it", {"parameters": 11 * GIB}, None, "use less")


def test_other_devices_have_memory_of_their_own():
    parts = {"parameters": 6 * GIB}
    for limit in (6 * GIB, None):  # None: it does not tell
        memory.require_room("it", parts, [chip(limit)] * 8, "use less")
    with pytest.raises(UserError, match=r"at least 6 GiB of memory on each a chip \(.*\), and it has 5 GiB; use less"):
        memory.require_room("it", parts, [chip(5 * GIB)] * 8, "use less")
