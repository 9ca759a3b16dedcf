"""What is read from HLO text: every collective, FLOP and byte as often as it runs, against counts by hand."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from diffusionlm.compile_check import hlo
from diffusionlm.config import MeshConfig
from diffusionlm.parallel import mesh as sharding

HEADER = "HloModule test, is_scheduled=true, num_partitions=8\n"
ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
ADD += "  ROOT %sum = f32[] add(%a, %b)\n}\n"


def module(*computations):
    return HEADER + ADD + "\n".join(computations)


def entry(*lines):
    return "ENTRY %main (p: f32[4,8]) -> f32[4,8] {\n  " + "\n  ".join(lines) + "\n}\n"


def computation(name, *lines):
    return f"%{name} (p: f32[4,8]) -> f32[4,8] {{\n  " + "\n  ".join(lines) + "\n}\n"


P0 = "%p = f32[4,8]{1,0} parameter(0)"


# --- bytes on the wire


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("all-gather", 36),  # each of 4 devices passes on 3 parts of 12 bytes
        ("reduce-scatter", 9),  # and here 3 quarters of its own
        ("all-reduce", 18),  # one after the other
        ("all-to-all", 9),
        ("collective-permute", 12),
    ],
)
def test_wire_bytes_on_a_ring_of_four(kind, expected):
    assert hlo.wire_bytes(kind, 12, 4) == expected


def test_nobody_sends_anything_alone():
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"):
        assert hlo.wire_bytes(kind, 12, 1) == 0


# --- groups of devices


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
    ],
)
def test_groups_in_every_notation(text, groups):
    line = f"ROOT %x = f32[4,8]{{1,0}} all-reduce(%p), channel_id=1, {text}, to_apply=%add"
    (found,) = hlo.analyse(module(entry(P0, line))).collectives
    assert found.groups == groups and found.group_size == len(groups[0])


def test_an_unknown_notation_is_refused():
    line = "ROOT %x = f32[4,8]{1,0} all-reduce(%p), replica_groups=<something new>, to_apply=%add"
    with pytest.raises(ValueError, match="something new"):
        hlo.analyse(module(entry(P0, line)))


def test_pairs_of_a_permute():
    line = "ROOT %x = f32[4,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}"
    (found,) = hlo.analyse(module(entry(P0, line))).collectives
    assert found.groups == ((0, 1), (1, 0)) and found.wire_bytes == 4 * 8 * 4


# --- loops

GATHER = "%g = f32[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}"


TOLD_3 = ', backend_config={"known_trip_count":{"n":"3"}}'


def loop(name, body, condition, attributes=""):
    return f"%{name} = f32[4,8]{{1,0}} while(%p), condition=%{condition}, body=%{body}{attributes}"


def limit(name, n, root="ROOT %lt = pred[] compare(%i, %n), direction=LT"):
    return computation(name, "%i = s32[] parameter(0)", f"%n = s32[]{{:T(128)}} constant({n})", root)


def test_loops_multiply():
    inner = computation("inner", P0, GATHER, "ROOT %r = f32[4,8]{1,0} slice(%g), slice={[0:4], [0:8]}")
    outer = computation("outer", P0, "ROOT " + loop("w", "inner", "c9", TOLD_3))
    text = module(inner, outer, limit("c9", 9), limit("c5", 5), entry(P0, "ROOT " + loop("w", "outer", "c5")))
    (found,) = hlo.analyse(text).collectives
    assert found.runs == 15 and found.operand_bytes == 4 * 8 * 4 and found.wire_bytes == 4 * 8 * 4


def test_a_condition_in_a_fusion():
    fused = computation(
        "cond", "%i = s32[] parameter(0)", "%n = s32[] parameter(1)", "ROOT %lt = pred[] compare(%i, %n), direction=LT"
    )
    body = computation("body", P0, "ROOT " + GATHER)
    root = "ROOT %f = pred[] fusion(%i, %n), kind=kLoop, calls=%cond"
    text = module(fused, body, limit("c", 6, root), entry(P0, "ROOT " + loop("w", "body", "c")))
    assert hlo.analyse(text).collectives[0].runs == 6


def test_loops_that_end_when_the_data_say_count_once():
    body = computation("body", P0, "ROOT " + GATHER)
    root = "ROOT %and = pred[] and(%i, %n)"
    found = hlo.analyse(module(body, limit("c", 6, root), entry(P0, "ROOT " + loop("w", "body", "c"))))
    assert found.endless == 1 and found.collectives[0].runs == 1


def test_the_caller_may_know_how_long_a_loop_runs():
    body = computation("body", P0, "ROOT " + GATHER)
    told = ', metadata={op_name="jit(step)/jvp()/vocabulary/while"}'
    root = "ROOT %lt = pred[] compare(%i, %j), direction=LT"
    condition = computation("c", "%i = s32[] parameter(0)", "%j = s32[] parameter(1)", root)
    text = module(body, condition, entry(P0, "ROOT " + loop("w", "body", "c", told)))
    found = hlo.analyse(text, {"vocabulary": 7})
    assert found.endless == 0 and found.collectives[0].runs == 7
    assert hlo.analyse(text, {"while": 7, "jvp()": 7}).endless == 1


def test_attributes_of_several_lines_do_not_end_a_computation():
    """As the TPU's attention kernels have them."""
    kernel = '%k = f32[4,8]{1,0} custom-call(%p), frontend_attributes={kernel_metadata={\n"x":"{1}"\n}}, metadata={}'
    text = module(entry(P0, kernel, "ROOT " + GATHER))
    assert len(hlo.analyse(text).collectives) == 1


def test_of_two_branches_the_dearest():
    cheap = computation("cheap", P0, "ROOT %r = f32[4,8]{1,0} copy(%p)")
    dear = computation("dear", P0, GATHER, "ROOT %r = f32[4,8]{1,0} copy(%p)")
    line = "ROOT %c = f32[4,8]{1,0} conditional(%p, %p, %p), branch_computations={%cheap, %dear}"
    found = hlo.analyse(module(cheap, dear, entry(P0, line)))
    assert len(found.collectives) == len(found.kernels) == 1


# --- asynchronous collectives


def test_a_start_and_its_done_are_one_collective():
    lines = [
        P0,
        "%s = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
        "%d = f32[8,8]{1,0} all-gather-done(%s)",
        "ROOT %r = f32[4,8]{1,0} slice(%d), slice={[0:4], [0:8]}",
    ]
    (found,) = hlo.analyse(module(entry(*lines))).collectives
    assert found.asynchronous and found.kind == "all-gather" and found.operand_bytes == 128


def test_a_collective_that_is_spread_over_fusions_is_one():
    parts = [computation(f"f{i}", P0, GATHER, "ROOT %r = f32[4,8]{1,0} negate(%p)") for i in range(3)]
    calls = [f"%r{i} = f32[4,8]{{1,0}} fusion(%p), kind=kCustom, calls=%f{i}" for i in range(3)]
    other = computation("f3", P0, GATHER.replace("channel_id=7", "channel_id=8"), "ROOT %r = f32[4,8]{1,0} negate(%p)")
    calls.append("ROOT %r3 = f32[4,8]{1,0} fusion(%p), kind=kCustom, calls=%f3")
    found = hlo.analyse(module(*parts, other, entry(P0, *calls))).collectives
    assert len(found) == 2 and all(one.asynchronous for one in found)


@pytest.mark.parametrize(
    "start", ["call-start(%p), to_apply=%beside", 'async-start(%p), async_execution_thread="x", calls=%beside']
)
def test_a_computation_on_another_thread_is_asynchronous(start):
    beside = computation("beside", P0, "ROOT " + GATHER)
    kind = start.split("-")[0]
    lines = [
        P0,
        f"%s = ((f32[4,8]{{1,0}}), f32[8,8]{{1,0}}) {start}",
        f"%u = ((f32[4,8]{{1,0}}), f32[8,8]{{1,0}}) {kind}-update(%s)",
        f"%d = f32[8,8]{{1,0}} {kind}-done(%u)",
        "ROOT %x = f32[4,8]{1,0} slice(%d), slice={[0:4], [0:8]}",
    ]
    (found,) = hlo.analyse(module(beside, entry(*lines))).collectives
    assert found.asynchronous and found.wire_bytes == 128


def test_sends_to_other_slices():
    target = '_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"'
    lines = [
        P0,
        "%t = token[] after-all()",
        f"%s = (f32[4,8]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%p, %t), channel_id=1, frontend_attributes={{{target}}}",
        f"%r = (f32[4,8]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%t), channel_id=2, frontend_attributes={{{target}}}",
        "ROOT %x = f32[4,8]{1,0} negate(%p)",
    ]
    (found,) = hlo.analyse(module(entry(*lines))).collectives
    assert found.between_slices and found.kind == "all-reduce" and found.group_size == 3
    assert found.wire_bytes == 2 * 2 / 3 * 128


# --- FLOPs and traffic

DILATED = "window={size=32 stride=31 lhs_dilate=32}, dim_labels=0bf_0oi->0bf"
PADDED = "window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"


@pytest.mark.parametrize(
    "left, right, result, attributes, flops",
    [
        ("4,8", "8,16", "4,16", "dim_labels=bf_io->bf", 2 * 4 * 8 * 16),
        ("4,8", "4,16", "8,16", "dim_labels=fb_io->bf", 2 * 4 * 8 * 16),
        # 32 heads as a batch, which the backend writes as a dilated window
        (
            "32,4,8",
            "32,16,8",
            "32,4,16",
            DILATED,
            32 * 1024,
        ),
        # a weight with 32 heads, as a padded window
        (
            "4,8,1",
            "32,16,8",
            "4,32,16",
            PADDED,
            32 * 1024,
        ),
    ],
)
def test_matmuls_as_the_backend_writes_them(left, right, result, attributes, flops):
    lines = [
        f"%a = bf16[{left}]{{0}} parameter(0)",
        f"%b = bf16[{right}]{{0}} parameter(1)",
        f"ROOT %c = f32[{result}]{{0}} convolution(%a, %b), {attributes}",
    ]
    (kernel,) = hlo.analyse(module(entry(*lines))).kernels
    assert kernel.flops == flops


def test_traffic_is_what_leaves_or_reaches_hbm():
    lines = [
        "%a = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)",
        "%b = f32[16,8]{1,0:T(8,128)S(1)} negate(%a)",  # 256 bytes read, and kept on the chip
        "ROOT %c = f32[16,8]{1,0:T(8,128)} negate(%b)",  # 512 bytes written
    ]
    assert [kernel.hbm_bytes for kernel in hlo.analyse(module(entry(*lines))).kernels] == [256, 512]


def test_of_a_slice_only_the_slice_is_moved():
    layers = "f32[32,4,8]{2,1,0}"
    read = computation(
        "read",
        f"%s = {layers} parameter(0)",
        "%i = s32[] parameter(1)",
        "%d = f32[1,4,8]{2,1,0} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,4,8}",
        "ROOT %n = f32[1,4,8]{2,1,0} negate(%d)",
    )
    write = computation(
        "write",
        f"%s = {layers} parameter(0)",
        "%u = f32[1,4,8]{2,1,0} parameter(1)",
        "%i = s32[] parameter(2)",
        f"ROOT %d = {layers} dynamic-update-slice(%s, %u, %i, %i, %i)",
    )
    lines = [
        f"%s = {layers} parameter(0)",
        "%i = s32[]{:S(6)} parameter(1)",
        "%r = f32[1,4,8]{2,1,0} fusion(%s, %i), kind=kLoop, calls=%read",
        f"ROOT %w = {layers} fusion(%s, %r, %i), kind=kLoop, calls=%write",
    ]
    assert [kernel.hbm_bytes for kernel in hlo.analyse(module(read, write, entry(*lines))).kernels] == [256, 256]


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.analyse("not a module")


# --- real programs


def compiled(body, shape=(8, 16)):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    spec = P("data", "fsdp")
    with jax.set_mesh(mesh):
        function = jax.jit(jax.shard_map(body, in_specs=spec, out_specs=spec, check_vma=False))
        return hlo.analyse(function.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text())


@pytest.mark.parametrize(
    "kind, groups, wire, operation",
    [
        ("all-reduce", ((0, 1, 2, 3), (4, 5, 6, 7)), 1.5 * 64, lambda x: jax.lax.psum(x, "fsdp")),
        ("all-reduce", ((0, 4), (1, 5), (2, 6), (3, 7)), 64, lambda x: jax.lax.psum(x, "data")),
        ("all-gather", ((0, 4), (1, 5), (2, 6), (3, 7)), 64, lambda x: jax.lax.all_gather(x, "data").sum(0)),
        ("all-to-all", ((0, 1, 2, 3), (4, 5, 6, 7)), 48, lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)),
    ],
)
def test_collectives_in_scans_of_a_real_program(kind, groups, wire, operation):
    """Of 4x4 float32 on each device, 64 bytes: 3 times 5 in a scan inside a scan, once outside."""

    def body(x):
        def inner(x, _):
            return jnp.tanh(operation(x)), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=5)[0] * 2, None

        return jax.lax.scan(outer, operation(x) + 1, None, length=3)[0]

    found = [one for one in compiled(body).collectives if one.kind == kind]
    assert sum(one.runs for one in found) == 16
    assert sum(one.runs * one.wire_bytes for one in found) == 16 * wire
    assert {tuple(map(tuple, map(sorted, one.groups))) for one in found} == {groups}


def test_every_collective_of_the_text_is_found():
    def body(x):
        x = jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return jax.lax.psum(x, ("data", "fsdp"))

    found = compiled(body)
    kinds = sorted((one.kind, one.group_size) for one in found.collectives)
    assert kinds == [("all-reduce", 8), ("collective-permute", 2)]
    assert re.fullmatch(r"jit\(body\)/.*psum.*", max(found.collectives, key=lambda one: one.group_size).where)
