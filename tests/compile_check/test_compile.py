"""The compile check: mistakes, and the memory, FLOPs and traffic of a toy that is compiled for real slices."""

import dataclasses
import importlib.util
import json
import math

import pytest
from support.command_line import TINY, options

import diffusionlm as dlm
from diffusionlm import flops, hardware
from diffusionlm.cli import main as cli
from diffusionlm.compile_check import compile as compile_check
from diffusionlm.compile_check import executed_flops, hlo
from diffusionlm.compile_check.workloads import training_step
from diffusionlm.config import OptimConfig
from diffusionlm.errors import UserError
from diffusionlm.hardware import GIB
from diffusionlm.parallel import mesh as mesh_lib

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]"
)


# The logits of a device are 8 MiB here, more than four times anything else that is gathered.
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


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "name the experiment first"),
        (["demo"], "missing --topology"),
        (["nonsense", "--topology", "v5e-8"], "nonsense"),
        (["demo", "--topology", "v5e-9"], "v5e-8"),
        (["demo", "--topology", "v5e-8", "--slices", "0"], "slices=0"),
        (["demo", "--topology", "v5e-8", "--json"], "--part autoregressive or full"),
        (["demo", "--topology", "v5e-8", "--part", "opening"], "part='opening' must be one of those of demo"),
        (["demo", "--topology", "v5e-8", "--sampling", "--part", "full"], "drop one of them"),
        (["demo", "--topology", "v5e-8", "--slices", "many"], "slices=many"),
        (["demo", "--topology", "v5e-8", "--mesh.fspd", "2"], "mesh.fsdp"),
        (["demo", "--topology", "v5e-8", "--model.n_heads", "0"], "n_heads"),
    ],
)
def test_a_mistake_is_one_line(args, expected, capsys):
    assert cli.main(["compile", *args]) == 2
    out, err = capsys.readouterr()
    assert expected in err and err.count("\n") == 1 and not out


def test_an_unknown_topology_is_a_user_error_in_a_notebook():
    with pytest.raises(UserError, match="v5e-8"):
        dlm.compile("demo", "v5e-3")


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
    """The compiled program, counted through its loops, agrees with the formulas to the last FLOP."""
    inside = 64 * executed_flops.splash_kernels(dlm.experiment("demo", TOY).model, 128)
    assert report.executed_flops - report.hlo_flops == inside > 0


@needs_libtpu
def test_annealed_attention_has_no_kernel():
    """No kernel takes a mask that is data, so XLA sees all matmuls; kernels would be four tenths of them."""
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
    """Return the costs of a toy training step on eight devices, and its HLO text."""
    cfg = dlm.experiment("demo", TOY)
    mesh = mesh_lib.make_mesh(cfg.mesh, compile_check.tpu_devices(hardware.parse("v5e-8")))
    executable, _ = compile_check._compile(training_step(cfg, mesh), mesh)
    text = executable.as_text()
    return hlo.analyse(text), text


@needs_libtpu
def test_no_logits_and_no_activations_are_sent(program):
    """Only weights are gathered: the rows of a device stay where they are."""
    model = dlm.experiment("demo", TOY).model
    largest = model.padded_vocab_size * model.d_model * 4  # a table with its gradient in float32
    logits = 8 * 128 * model.padded_vocab_size * 4
    assert logits > 4 * largest
    for collective in program[0].collectives:
        gathered = collective.group_size if collective.kind == "all-gather" else 1
        assert collective.operand_bytes * gathered <= largest, collective


@needs_libtpu
def test_the_corruption_sends_no_noise(program):
    """Every device draws the noise of its own rows; XLA only passes on a few counters of the generator."""
    costs, text = program
    assert "/corruption/" in text
    noise = 8 * 128 * 4  # of the rows of one device
    collectives = [collective for collective in costs.collectives if "/corruption/" in collective.where]
    assert sum(collective.runs * collective.wire_bytes for collective in collectives) < noise / 16


@needs_libtpu
def test_two_slices_exchange_gradients_alone():
    cfg = dlm.experiment("demo", TOY | {"mesh.data": 2, "mesh.fsdp": 8, "data.batch_size": 128})
    report = dlm.compile(cfg, "v5e-8", slices=2)
    assert report.chips == 16 and report.fits
    between = [traffic for traffic in report.collectives if traffic.network == "dcn"]
    assert {traffic.kind for traffic in between} == {"all-reduce"} and {traffic.group_size for traffic in between} == {
        2
    }
    # Each device sends its part of the gradients, in float32 at most, and half of the embedding's twice.
    part = flops.memory(cfg.model, cfg.optim, shards=8).gradients
    assert 0.4 * part < sum(traffic.bytes for traffic in between) < 4 * part


@needs_libtpu
def test_the_sampler_needs_parameters_in_the_compute_type_alone():
    cfg = dlm.experiment("demo", TOY | {"model.dtype": "bfloat16"})
    report = dlm.compile(cfg, "v5e-8", sampling=dlm.SamplingConfig(length=100), count=8)
    assert report.fits and report.program == "sample" and report.hbm_per_chip_bytes.optimizer == 0
    whole = 2 * flops.parameters(cfg.model).stored
    assert whole / 8 <= report.hbm_per_chip_bytes.params < 1.05 * whole / 8
    assert any("denoising step" in warning for warning in report.warnings)


@needs_libtpu
def test_json_has_the_documented_keys_and_is_all_of_stdout(capsys):
    assert cli.main(["compile", "demo", "--topology", "v5litepod-8", "--json", *options(TOY)]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    keys = {"experiment", "topology", "chips", "fits", "hbm_per_chip_bytes", "model_flops", "collectives"}
    assert keys | {"estimated_step_seconds", "estimated_mfu"} <= set(values)
    assert {"limit", "params", "optimizer", "temporary", "peak"} <= set(values["hbm_per_chip_bytes"])
    assert values["experiment"] == "demo" and values["topology"] == "v5e-8" and "compiling" in err


BIG = TOY | {"data.batch_size": 2**13, "model.max_length": 2048, "data.sequence_length": 2048}


@needs_libtpu
def test_a_run_that_does_not_fit(capsys):
    assert cli.main(["compile", "demo", "--topology", "v5e-8", "--json", *options(BIG)]) == 1
    values = json.loads(capsys.readouterr().out)
    hbm = values["hbm_per_chip_bytes"]
    assert not values["fits"] and values["estimated_mfu"] is None
    assert hbm["headroom"] == hbm["limit"] - hbm["peak"] < 0
    assert all(fix["bytes"] <= hbm["limit"] for fix in values["fixes"])
    settings = [tuple(word for word in fix["change"].split() if word.startswith("--")) for fix in values["fixes"]]
    assert ("--run.microbatches",) in settings and len(set(settings)) == len(settings)


@needs_libtpu
@pytest.mark.slow
def test_the_advice_makes_the_run_fit():
    fixes = dlm.compile(dlm.experiment("demo", BIG), "v5e-8").fixes
    fix = next(fix for fix in fixes if fix.change.startswith("--run.microbatches "))
    report = dlm.compile(dlm.experiment("demo", BIG | {"run.microbatches": fix.change.split()[1]}), "v5e-8")
    assert report.fits and report.hbm_per_chip_bytes.peak < 2 * fix.bytes


@pytest.mark.parametrize(
    "message, size",
    [
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (26.25G) exceeds available HBM", 26.25),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 37.5G of 15.75G hbm.", 37.5),
        ("INTERNAL: something else (26.25G)", 0),
    ],
)
def test_the_requested_memory_is_read_from_the_message_of_libtpu(message, size):
    assert compile_check._requested_bytes(message) == size * GIB


@needs_libtpu
@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=lambda chip: chip.name)
def test_libtpu_knows_every_shape(chip):
    for size, shape in hardware.shapes(chip).items():
        if math.prod(shape) > 1024:  # the others would take a minute
            continue
        topology = hardware.parse(f"{chip.name}-{size}")
        devices = compile_check.tpu_devices(topology)
        assert len(devices) == topology.devices
        assert tuple(max(d.coords[axis] for d in devices) + 1 for axis in range(len(shape))) == shape
        assert hardware.peak_flops(devices[0].device_kind) == chip.peak_flops / chip.devices


@needs_libtpu
@pytest.mark.slow
def test_llada_8b_fits_a_pod():
    cfg = dlm.experiment("llada_8b")
    report = dlm.compile(cfg, "v5e-256")
    inside = cfg.data.batch_size * executed_flops.splash_kernels(cfg.model, 4096)
    assert report.fits and report.hlo_flops + inside == pytest.approx(report.executed_flops, rel=0.01)
    assert report.hbm_per_chip_bytes.params == pytest.approx(4 * 8.016e9 / 256, rel=0.01)
    assert 0.2 < report.estimated_mfu < 0.787  # 6/8 and the head: what full rematerialisation leaves


@needs_libtpu
@pytest.mark.slow
def test_fine_tuning_llada_8b_fits_pods():
    """With one sequence on each of 256 chips, and with four."""
    cfg = dlm.experiment("llada_8b_sft")
    for name, rows in (("v5e-256", 1), ("v5p-128", 4)):
        report = dlm.compile(cfg, name)
        inside = 256 * executed_flops.splash_kernels(cfg.model, 4096)
        assert report.chips * rows == cfg.data.batch_size
        assert report.fits and report.hlo_flops + inside == pytest.approx(report.executed_flops, rel=0.01)
