"""The compile check: mistakes, the memory that it reports, and what the compiled programs do and do not send."""

import dataclasses
import importlib.util
import json
import math

import pytest
from support.command_line import TINY, options

import diffusionlm as dlm
from diffusionlm import flops, hardware
from diffusionlm import hardware as topology
from diffusionlm.cli import main as cli
from diffusionlm.compile_check import advice, hlo, roofline
from diffusionlm.compile_check import compile as aot
from diffusionlm.compile_check.roofline import Network, Terms, Traffic
from diffusionlm.compile_check.table import verdict
from diffusionlm.config import MeshConfig, OptimConfig
from diffusionlm.errors import UserError
from diffusionlm.parallel import mesh as sharding

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]"
)
# Logits of a device are 8 MiB here, more than four times anything else that is ever gathered.
TOY = TINY | {
    "model.d_model": 128,
    "model.head_dim": 64,
    "model.n_layers": 3,
    "model.d_ff": 256,
    "model.vocab_size": 2000,
    "model.max_length": 128,
    "model.head_chunk": 256,
    "data.sequence_length": 128,
    "data.batch_size": 64,
}


# --- mistakes


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "name the experiment first"),
        (["demo"], "--topology is missing"),
        (["nonsense", "--topology", "v5e-8"], "nonsense"),
        (["demo", "--topology", "v5e-9"], "v5e-8"),
        (["demo", "--topology", "v5e-8", "--slices", "0"], "slices=0"),
        (["demo", "--topology", "v5e-8", "--slices", "many"], "slices=many"),
        (["demo", "--topology", "v5e-8", "--mesh.fspd", "2"], "mesh.fsdp"),
        (["demo", "--topology", "v5e-8", "--model.n_heads", "0"], "n_heads"),
    ],
)
def test_a_mistake_is_one_line(args, expected, capsys):
    assert cli.main(["compile", *args]) == 2
    out, err = capsys.readouterr()
    assert expected in err and err.count("\n") == 1 and not out


def test_without_libtpu_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["compile", "demo", "--topology", "v5e-8"]) == 2
    _, err = capsys.readouterr()
    assert "pip install -e '.[tpu]'" in err and err.count("\n") == 1


@needs_libtpu
@pytest.mark.parametrize(
    "args, expected",
    [
        (["--slices", "2"], "mesh.data=1 must be a multiple of the 2 slices"),
        (["--mesh.tensor", "3"], "does not fit 8 device"),
        (["--data.batch_size", "12"], "data.batch_size=12"),
        (["--sampling", "--count", "0"], "count=0"),
    ],
)
def test_a_run_that_the_slice_cannot_split_is_one_line(args, expected, capsys):
    assert cli.main(["compile", "demo", "--topology", "v5e-8", *options(TOY), *args]) == 2
    _, err = capsys.readouterr()
    assert expected in err and err.count("\n") == 1


# --- a toy, compiled


@pytest.fixture(scope="module")
def report():
    return dlm.compile(dlm.experiment("demo", TOY), "v5e-8")


@needs_libtpu
def test_the_report_of_a_run_that_fits(report):
    cfg = dlm.experiment("demo", TOY)
    assert report.fits and report.chips == 8 and report.mesh == {"data": 1, "fsdp": 8, "tensor": 1}
    hbm = report.hbm_per_chip_bytes
    assert hbm.limit == int(15.75 * GIB) and hbm.params + hbm.optimizer + hbm.temporary <= hbm.peak <= hbm.limit
    assert report.model_flops == 64 * flops.train(cfg.model, 128, "model", predicted=0.5)
    assert report.executed_flops >= report.model_flops
    assert sum(dataclasses.astuple(report.roofline_seconds)) == pytest.approx(report.estimated_step_seconds)
    assert 0 < report.estimated_mfu < 1 and not report.fixes


@needs_libtpu
def test_the_compiled_matmuls_are_those_of_the_ledger(report):
    """What XLA makes of the program, counted through its loops, against the formulas; to the last FLOP."""
    inside = 64 * flops.splash_kernels(dlm.experiment("demo", TOY).model, 128)
    assert report.executed_flops - report.hlo_flops == inside > 0


@needs_libtpu
def test_attention_that_opens_up_has_no_kernel():
    """No kernel takes a mask that is data, so that XLA sees all matmuls; kernels would be four tenths of these."""
    shifted = TOY | {"diffusion.alignment": "shifted", "diffusion.anneal_steps": 2}
    report = dlm.compile(dlm.experiment("demo", shifted), "v5e-8")
    assert report.hlo_flops == pytest.approx(report.executed_flops, rel=0.03)


@needs_libtpu
def test_parameters_and_moments_are_split_over_all_devices(report):
    stored = flops.memory(dlm.experiment("demo", TOY).model, OptimConfig(), shards=8)
    hbm = report.hbm_per_chip_bytes
    # Norm gains are not split; they are small.
    assert stored.params <= hbm.params < 1.05 * stored.params
    assert stored.optimizer <= hbm.optimizer < 1.05 * stored.optimizer
    whole = dlm.compile(dlm.experiment("demo", TOY | {"mesh.data": 8, "mesh.fsdp": 1}), "v5e-8").hbm_per_chip_bytes
    assert whole.optimizer == pytest.approx(8 * hbm.optimizer, rel=0.05)


@pytest.fixture(scope="module")
def program():
    """What a toy training step does on eight devices, and its text."""
    cfg = dlm.experiment("demo", TOY)
    mesh = sharding.make_mesh(cfg.mesh, aot.tpu_devices(topology.parse("v5e-8")))
    with aot.jax.set_mesh(mesh):
        text = aot._training(cfg, mesh).lower().compile().as_text()
    return hlo.analyse(text), text


@needs_libtpu
def test_no_logits_and_no_activations_are_sent(program):
    """Gathers are of weights alone: the rows of a device stay where they are."""
    model = dlm.experiment("demo", TOY).model
    largest = model.padded_vocab_size * model.d_model * 4  # a table with its gradient in float32
    logits = 8 * 128 * model.padded_vocab_size * 4
    assert logits > 4 * largest
    for one in program[0].collectives:
        result = one.operand_bytes * (one.group_size if one.kind == "all-gather" else 1)
        assert result <= largest, one


@needs_libtpu
def test_the_corruption_sends_no_noise(program):
    """Every device draws the noise of its own rows; XLA only passes on a few counters of the generator."""
    found, text = program
    assert "/corruption/" in text
    noise = 8 * 128 * 4  # of the rows of one device
    assert sum(one.runs * one.wire_bytes for one in found.collectives if "/corruption/" in one.where) < noise / 16


@needs_libtpu
def test_two_slices_exchange_gradients_alone():
    cfg = dlm.experiment("demo", TOY | {"mesh.data": 2, "mesh.fsdp": 8, "data.batch_size": 128})
    report = dlm.compile(cfg, "v5e-8", slices=2)
    assert report.chips == 16 and report.fits
    between = [one for one in report.collectives if one.network == "dcn"]
    assert {one.kind for one in between} == {"all-reduce"} and {one.group_size for one in between} == {2}
    # Each device sends its part of the gradients, in float32 at most, and half of the embedding's twice.
    part = flops.memory(cfg.model, cfg.optim, shards=8).gradients
    assert 0.4 * part < sum(one.bytes for one in between) < 4 * part


@needs_libtpu
def test_the_sampler():
    cfg = dlm.experiment("demo", TOY | {"model.dtype": "bfloat16"})
    report = dlm.compile(cfg, "v5e-8", sampling=dlm.SamplingConfig(length=100), count=8)
    assert report.fits and report.program == "sample" and report.hbm_per_chip_bytes.optimizer == 0
    whole = 2 * flops.parameters(cfg.model).stored
    assert whole / 8 <= report.hbm_per_chip_bytes.params < 1.05 * whole / 8
    assert any("denoising step" in warning for warning in report.warnings)


@needs_libtpu
def test_json_is_the_contract_and_all_there_is_on_stdout(capsys):
    assert cli.main(["compile", "demo", "--topology", "v5litepod-8", "--json", *options(TOY)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    keys = {"experiment", "topology", "chips", "fits", "hbm_per_chip_bytes", "model_flops", "collectives"}
    assert keys | {"estimated_step_seconds", "estimated_mfu"} <= set(found)
    assert {"limit", "params", "optimizer", "temporary", "peak"} <= set(found["hbm_per_chip_bytes"])
    assert found["experiment"] == "demo" and found["topology"] == "v5e-8" and "compiling" in err


BIG = TOY | {"data.batch_size": 2**13, "model.max_length": 2048, "data.sequence_length": 2048}


@needs_libtpu
def test_a_run_that_does_not_fit(capsys):
    assert cli.main(["compile", "demo", "--topology", "v5e-8", "--json", *options(BIG)]) == 1
    found = json.loads(capsys.readouterr().out)
    hbm = found["hbm_per_chip_bytes"]
    assert not found["fits"] and found["estimated_mfu"] is None
    assert hbm["headroom"] == hbm["limit"] - hbm["peak"] < 0
    assert all(fix["bytes"] <= hbm["limit"] for fix in found["fixes"])
    settings = [tuple(word for word in fix["change"].split() if word.startswith("--")) for fix in found["fixes"]]
    assert ("--run.microbatches",) in settings and len(set(settings)) == len(settings)


@needs_libtpu
@pytest.mark.slow
def test_with_what_is_advised_it_fits():
    fixes = dlm.compile(dlm.experiment("demo", BIG), "v5e-8").fixes
    fix = next(fix for fix in fixes if fix.change.startswith("--run.microbatches "))
    report = dlm.compile(dlm.experiment("demo", BIG | {"run.microbatches": fix.change.split()[1]}), "v5e-8")
    assert report.fits and report.hbm_per_chip_bytes.peak < 2 * fix.bytes


def test_what_does_not_fit_is_told_in_one_line_with_the_shortfall():
    hbm = aot.Hbm(limit=16 * GIB, params=GIB, optimizer=2 * GIB, temporary=20 * GIB, peak=23 * GIB)
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(aot.CompileReport))
    facts = {"experiment": "x", "program": "train", "topology": "v5e-8", "slices": 2, "fits": False}
    fixes = (advice.Fix("--run.microbatches 2", 12 * GIB),)
    line = verdict(aot.CompileReport(**nothing | facts | {"hbm_per_chip_bytes": hbm, "fixes": fixes}))
    assert "2 x v5e-8" in line and "7.00 GiB above the 16.00" in line and "\n" not in line
    assert "--run.microbatches 2 (about 12.0 GiB)" in line


@pytest.mark.parametrize(
    "message, size",
    [
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (26.25G) exceeds available HBM", 26.25),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 37.5G of 15.75G hbm.", 37.5),
        ("INTERNAL: something else (26.25G)", 0),
    ],
)
def test_what_libtpu_says_when_memory_runs_out(message, size):
    assert aot._exhausted(message) == size * GIB


@needs_libtpu
@pytest.mark.parametrize("chip", topology.CHIPS.values(), ids=lambda chip: chip.name)
def test_libtpu_knows_every_shape(chip):
    for size, shape in topology.shapes(chip).items():
        if math.prod(shape) > 1024:  # the others would take a minute
            continue
        found = topology.parse(f"{chip.name}-{size}")
        devices = aot.tpu_devices(found)
        assert len(devices) == found.devices
        assert tuple(max(d.coords[axis] for d in devices) + 1 for axis in range(len(shape))) == shape
        assert hardware.peak_flops(devices[0].device_kind) == chip.peak_flops / chip.devices


@needs_libtpu
@pytest.mark.slow
def test_llada_8b_fits_a_pod():
    cfg = dlm.experiment("llada_8b")
    report = dlm.compile(cfg, "v5e-256")
    inside = cfg.data.batch_size * flops.splash_kernels(cfg.model, 4096)
    assert report.fits and report.hlo_flops + inside == pytest.approx(report.executed_flops, rel=0.01)
    assert report.hbm_per_chip_bytes.params == pytest.approx(4 * 8.016e9 / 256, rel=0.01)
    assert 0.2 < report.estimated_mfu < 0.787  # 6/8 and the head: what full rematerialisation leaves


@needs_libtpu
@pytest.mark.slow
def test_llada_8b_s_fine_tuning_fits_pods():
    """With one sequence on each of 256 chips, and with four."""
    cfg = dlm.experiment("llada_8b_sft")
    for name, rows in (("v5e-256", 1), ("v5p-128", 4)):
        report = dlm.compile(cfg, name)
        inside = 256 * flops.splash_kernels(cfg.model, 4096)
        assert report.chips * rows == cfg.data.batch_size
        assert report.fits and report.hlo_flops + inside == pytest.approx(report.executed_flops, rel=0.01)


# --- the roofline


class Device:
    def __init__(self, coords, slice_index=0):
        self.coords, self.slice_index = coords, slice_index


def network(name, slices=1):
    found = topology.parse(name, slices)
    coords = [(0, 0, 0)]
    for axis, side in enumerate(found.shape):
        coords = [place[:axis] + (i,) + place[axis + 1 :] for place in coords for i in range(side)]
    return Network(found, [Device(place, s) for s in range(slices) for place in coords])


def reduce(groups, size=1e9, kind="all-reduce", **more):
    return hlo.Collective(kind, int(size), groups, 1, False, "", **more)


def test_a_collective_over_a_cube_uses_all_six_links():
    cost = network("v5p-128").cost(reduce((tuple(range(64)),)))
    assert cost.ici_bytes == pytest.approx(2 * 63 / 64 * 1e9) and not cost.dcn_bytes
    # The longest way is half of each ring of 4, and there and back.
    assert cost.ici_seconds == pytest.approx(cost.ici_bytes / (6 * 90e9) + 2 * 6 * roofline.HOP_SECONDS)


@pytest.mark.parametrize(
    "name, group, links",
    [
        ("v5p-128", range(4), 2),  # a ring along one axis
        ("v5p-128", range(2), 1),  # a part of it
        ("v5e-256", range(16), 2),
        ("v5e-256", range(256), 4),
        ("v5e-64", range(8), 1),  # too short to be a ring
        ("v5e-64", range(64), 2),
    ],
)
def test_links_of_a_group(name, group, links):
    found = network(name)
    cost = found.cost(reduce((tuple(group),), 1e12))
    assert cost.ici_seconds == pytest.approx(cost.ici_bytes / (links * found.topology.chip.link_bandwidth), rel=1e-3)


def test_between_slices_the_network_card_is_the_link():
    found = network("v5e-8", 2)
    cost = found.cost(reduce(((1, 2),), between_slices=True))
    assert cost.dcn_bytes == 1e9 and not cost.ici_bytes  # 2 * (2 - 1) / 2
    assert cost.dcn_seconds == pytest.approx(1e9 / 3.125e9, rel=1e-2)
    # A group over all devices of both slices first works within them, so that a byte crosses once.
    both = found.cost(reduce((tuple(range(16)),)))
    assert both.ici_bytes == pytest.approx(2 * 7 / 8 * 1e9) and both.dcn_bytes == pytest.approx(1e9 / 8)


def kernel(flops=0, size=0, runs=1, asynchronous=False):
    return hlo.Kernel(flops, size, runs, asynchronous, False, "")


def traffic(seconds, asynchronous, network="ici"):
    return Traffic("all-gather", network, 8, asynchronous, 1, 1.0, seconds, "")


def test_terms_add_up_to_what_nothing_hides():
    where = topology.parse("v5e-8")  # 197e12 FLOP/s, 819e9 bytes/s
    kernels = (kernel(flops=int(197e12)), kernel(size=int(819e9 / 2), runs=4), kernel(size=819, asynchronous=True))
    program = hlo.Program((), kernels, 0)
    assert roofline.terms(program, [], where, 197e12) == Terms(pytest.approx(1), pytest.approx(2), 0, 0)
    hidden = roofline.terms(program, [traffic(2, True)], where, 197e12)
    assert hidden.ici == 0
    shown = roofline.terms(program, [traffic(4, True), traffic(0.5, False), traffic(1, False, "dcn")], where, 197e12)
    assert shown.ici == pytest.approx(1.5) and shown.dcn == 1 and shown.total == pytest.approx(5.5)


def test_a_kernel_takes_the_longer_of_its_matmul_and_its_traffic():
    where = topology.parse("v5e-8")
    program = hlo.Program((), (kernel(flops=int(197e12), size=int(819e9 * 1.5)),), 0)
    assert roofline.terms(program, [], where, 197e12).total == pytest.approx(1.5)


# --- advice


def test_advice_is_below_the_limit_and_changes_what_it_says():
    cfg, where = dlm.experiment("llada_8b", {"run.microbatches": 1}), topology.parse("v5e-256")
    found = advice.fixes(cfg, where, 26.6 * GIB)
    assert [fix.change for fix in found] == ["--run.microbatches 5"]  # 5 rows a device, and there is no larger slice
    assert all(fix.bytes <= where.chip.hbm_bytes for fix in found)
    plain = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="none"))
    assert advice.ledger(plain, 256) > 4 * advice.ledger(cfg, 256)
    assert not advice.fixes(cfg, where, 1e6 * GIB)


def test_the_ledger_counts_the_state_as_the_ledger_of_flops():
    cfg = dlm.experiment("llada_8b", {"run.microbatches": 5})
    small = dataclasses.replace(cfg, mesh=MeshConfig(data=256, fsdp=1))
    state = flops.memory(cfg.model, cfg.optim)
    # Everything else is the same on both meshes.
    assert advice.ledger(small, 256) - advice.ledger(cfg, 256) == pytest.approx(
        (1 - 1 / 256) * (state.total + state.gradients), rel=1e-6
    )


def test_an_unknown_program_of_a_notebook_is_a_user_error():
    with pytest.raises(UserError, match="v5e-8"):
        dlm.compile("demo", "v5e-3")
