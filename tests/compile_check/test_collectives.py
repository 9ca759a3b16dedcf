"""Collectives in HLO text: groups of devices in every notation, and bytes by hand."""

import pytest
from support.hlo_modules import P0, entry, module

from diffusionlm.compile_check import hlo
from diffusionlm.compile_check.collectives import wire_bytes


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("all-gather", 36),  # each of 4 devices passes on 3 parts of 12 bytes
        ("reduce-scatter", 9),  # 3 quarters of its own
        ("all-reduce", 18),  # a reduce-scatter, then an all-gather
        ("all-to-all", 9),
        ("collective-permute", 12),
    ],
)
def test_wire_bytes_on_a_ring_of_four(kind, expected):
    assert wire_bytes(kind, 12, 4) == expected


def test_a_single_device_sends_nothing():
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"):
        assert wire_bytes(kind, 12, 1) == 0


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups={}", (tuple(range(8)),)),
        ("", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}", ((0, 2), (4, 6), (1, 3), (5, 7))),
    ],
)
def test_groups_in_every_notation(text, groups):
    line = f"ROOT %x = f32[4,8]{{1,0}} all-reduce(%p), channel_id=1, {text}, to_apply=%add"
    (collective,) = hlo.analyse(module(entry(P0, line))).collectives
    assert collective.groups == groups and collective.group_size == len(groups[0])


def test_an_unknown_notation_is_refused():
    line = "ROOT %x = f32[4,8]{1,0} all-reduce(%p), replica_groups=<something new>, to_apply=%add"
    with pytest.raises(ValueError, match="something new"):
        hlo.analyse(module(entry(P0, line)))


def test_a_permute_has_pairs():
    line = "ROOT %x = f32[4,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}"
    (collective,) = hlo.analyse(module(entry(P0, line))).collectives
    assert collective.groups == ((0, 1), (1, 0)) and collective.wire_bytes == 4 * 8 * 4


def test_sends_to_other_slices_are_one_collective():
    target = '_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"'
    lines = [
        P0,
        "%t = token[] after-all()",
        f"%s = (f32[4,8]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%p, %t), channel_id=1, frontend_attributes={{{target}}}",
        f"%r = (f32[4,8]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%t), channel_id=2, frontend_attributes={{{target}}}",
        "ROOT %x = f32[4,8]{1,0} negate(%p)",
    ]
    (collective,) = hlo.analyse(module(entry(*lines))).collectives
    assert collective.between_slices and collective.kind == "all-reduce" and collective.group_size == 3
    assert collective.wire_bytes == 2 * 2 / 3 * 128
