"""Walking HLO text: everything counts as often as it runs."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from support.hlo_modules import GATHER, P0, computation, entry, module

from diffusionlm.compile_check import hlo
from diffusionlm.config import MeshConfig
from diffusionlm.parallel import mesh as mesh_lib

THREE_TRIPS = ', backend_config={"known_trip_count":{"n":"3"}}'


def loop(name, body, condition, attributes=""):
    return f"%{name} = f32[4,8]{{1,0}} while(%p), condition=%{condition}, body=%{body}{attributes}"


def limit(name, n, root="ROOT %lt = pred[] compare(%i, %n), direction=LT"):
    return computation(name, "%i = s32[] parameter(0)", f"%n = s32[]{{:T(128)}} constant({n})", root)


def test_loops_multiply():
    inner = computation("inner", P0, GATHER, "ROOT %r = f32[4,8]{1,0} slice(%g), slice={[0:4], [0:8]}")
    outer = computation("outer", P0, "ROOT " + loop("w", "inner", "c9", THREE_TRIPS))
    text = module(inner, outer, limit("c9", 9), limit("c5", 5), entry(P0, "ROOT " + loop("w", "outer", "c5")))
    (collective,) = hlo.analyse(text).collectives
    assert collective.runs == 15 and collective.operand_bytes == 4 * 8 * 4 and collective.wire_bytes == 4 * 8 * 4


def test_the_limit_of_a_loop_is_read_from_a_fused_condition():
    fused = computation(
        "cond", "%i = s32[] parameter(0)", "%n = s32[] parameter(1)", "ROOT %lt = pred[] compare(%i, %n), direction=LT"
    )
    body = computation("body", P0, "ROOT " + GATHER)
    root = "ROOT %f = pred[] fusion(%i, %n), kind=kLoop, calls=%cond"
    text = module(fused, body, limit("c", 6, root), entry(P0, "ROOT " + loop("w", "body", "c")))
    assert hlo.analyse(text).collectives[0].runs == 6


def test_loops_of_unknown_length_count_once():
    body = computation("body", P0, "ROOT " + GATHER)
    root = "ROOT %and = pred[] and(%i, %n)"
    costs = hlo.analyse(module(body, limit("c", 6, root), entry(P0, "ROOT " + loop("w", "body", "c"))))
    assert costs.unknown_loops == 1 and costs.collectives[0].runs == 1


def test_the_caller_can_give_trip_counts():
    body = computation("body", P0, "ROOT " + GATHER)
    attributes = ', metadata={op_name="jit(step)/jvp()/vocabulary/while"}'
    root = "ROOT %lt = pred[] compare(%i, %j), direction=LT"
    condition = computation("c", "%i = s32[] parameter(0)", "%j = s32[] parameter(1)", root)
    text = module(body, condition, entry(P0, "ROOT " + loop("w", "body", "c", attributes)))
    costs = hlo.analyse(text, {"vocabulary": 7})
    assert costs.unknown_loops == 0 and costs.collectives[0].runs == 7
    assert hlo.analyse(text, {"while": 7, "jvp()": 7}).unknown_loops == 1


def test_attributes_of_several_lines_do_not_end_a_computation():
    """The TPU's attention kernels have them."""
    kernel = '%k = f32[4,8]{1,0} custom-call(%p), frontend_attributes={kernel_metadata={\n"x":"{1}"\n}}, metadata={}'
    text = module(entry(P0, kernel, "ROOT " + GATHER))
    assert len(hlo.analyse(text).collectives) == 1


def test_a_conditional_costs_its_dearest_branch():
    cheap = computation("cheap", P0, "ROOT %r = f32[4,8]{1,0} copy(%p)")
    dear = computation("dear", P0, GATHER, "ROOT %r = f32[4,8]{1,0} copy(%p)")
    line = "ROOT %c = f32[4,8]{1,0} conditional(%p, %p, %p), branch_computations={%cheap, %dear}"
    costs = hlo.analyse(module(cheap, dear, entry(P0, line)))
    assert len(costs.collectives) == len(costs.kernels) == 1


def test_a_start_and_its_done_are_one_collective():
    lines = [
        P0,
        "%s = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
        "%d = f32[8,8]{1,0} all-gather-done(%s)",
        "ROOT %r = f32[4,8]{1,0} slice(%d), slice={[0:4], [0:8]}",
    ]
    (collective,) = hlo.analyse(module(entry(*lines))).collectives
    assert collective.asynchronous and collective.kind == "all-gather" and collective.operand_bytes == 128


def test_a_collective_spread_over_fusions_counts_once():
    parts = [computation(f"f{i}", P0, GATHER, "ROOT %r = f32[4,8]{1,0} negate(%p)") for i in range(3)]
    calls = [f"%r{i} = f32[4,8]{{1,0}} fusion(%p), kind=kCustom, calls=%f{i}" for i in range(3)]
    other = computation("f3", P0, GATHER.replace("channel_id=7", "channel_id=8"), "ROOT %r = f32[4,8]{1,0} negate(%p)")
    calls.append("ROOT %r3 = f32[4,8]{1,0} fusion(%p), kind=kCustom, calls=%f3")
    collectives = hlo.analyse(module(*parts, other, entry(P0, *calls))).collectives
    assert len(collectives) == 2 and all(collective.asynchronous for collective in collectives)


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
    (collective,) = hlo.analyse(module(beside, entry(*lines))).collectives
    assert collective.asynchronous and collective.wire_bytes == 128


def test_text_that_is_not_a_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.analyse("not a module")


def compiled(body, shape=(8, 16)):
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=4))
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
    """Each device has 4x4 float32, 64 bytes: 3 times 5 in a scan inside a scan, and once outside."""

    def body(x):
        def inner(x, _):
            return jnp.tanh(operation(x)), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=5)[0] * 2, None

        return jax.lax.scan(outer, operation(x) + 1, None, length=3)[0]

    collectives = [collective for collective in compiled(body).collectives if collective.kind == kind]
    assert sum(collective.runs for collective in collectives) == 16
    assert sum(collective.runs * collective.wire_bytes for collective in collectives) == 16 * wire
    assert {tuple(map(tuple, map(sorted, collective.groups))) for collective in collectives} == {groups}


def test_every_collective_of_the_text_is_costs():
    def body(x):
        x = jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return jax.lax.psum(x, ("data", "fsdp"))

    collectives = compiled(body).collectives
    kinds = sorted((collective.kind, collective.group_size) for collective in collectives)
    assert kinds == [("all-reduce", 8), ("collective-permute", 2)]
    assert re.fullmatch(r"jit\(body\)/.*psum.*", max(collectives, key=lambda collective: collective.group_size).where)
