"""Plans: what a sweep takes, against arithmetic by hand."""

import json
from types import SimpleNamespace

import pytest
from support.tiny_sweep import tiny_sweep

from diffusionlm import hardware
from diffusionlm.cli.main import main
from diffusionlm.compile_check import compile as compile_check
from diffusionlm.compile_check import table
from diffusionlm.errors import UserError
from diffusionlm.scaling import commands as sweep
from diffusionlm.scaling.sweep import plan as planning


def test_a_cell_takes_what_arithmetic_says():
    """SMDM's 170M at 1e19 FLOPs: 18,710 steps of 256 x 2048 tokens; v5p has 459e12 FLOP/s."""
    cells = {(c.objective, c.preset, c.budget_flops): c for c in sweep.plan("smdm_isoflop", mfu=0.5).cells}
    cell = cells["mdm", "smdm_170m", 1e19]
    sequences = 18710 * 256
    assert (cell.steps, cell.tokens, cell.batch_size, cell.sequence_length) == (18710, sequences * 2048, 256, 2048)
    assert cell.params == cell.params_non_embedding == 169_897_728
    assert cell.flops == cell.flops_6nd == 6 * 169_897_728 * cell.tokens
    N, head, d, layers = 169_897_728, 32128 * 768, 768, 18  # 32,001 rows, padded to a multiple of 128
    norms = (2 * layers + 1) * d
    by_hand = cell.tokens * (6 * (N - norms + head) + 12 * layers * 2048 * d)
    assert cell.flops_model == pytest.approx(by_hand, rel=1e-12)
    assert cell.flops_credited == pytest.approx(by_hand - cell.tokens * 3 * head, rel=1e-12)  # half of the head
    # A third of what training costs, for each of 12,800 records in 8 draws.
    assert cell.flops_evaluation == pytest.approx(cell.flops_credited / sequences / 3 * 12_800 * 8)
    spent = cell.flops_credited + cell.flops_evaluation
    assert cell.chip_hours["v5p"] == pytest.approx(spent / (0.5 * 459e12) / 3600)
    twin = cells["arm", "smdm_170m", 1e19]
    by_hand = cell.tokens * (6 * (N - norms + 32000 * 768) + 12 * layers * 2048 * d)  # it needs no row for the mask
    assert twin.flops_evaluation == pytest.approx(twin.flops_model / sequences / 3 * 12_800), "nothing is drawn"
    assert twin.flops_credited == twin.flops_model == pytest.approx(by_hand, rel=1e-12)


def test_a_road_takes_the_head_at_every_position_while_it_is_autoregressive():
    cells = {(c.objective, c.preset, c.budget_flops): c for c in sweep.plan("road_cpu", everything=True).cells}
    road, arm = cells["arm75", "cpu_262k", 1.6e13], cells["arm", "cpu_389k", 1.6e13]
    assert road.arm_share == 0.75 and road.arm_steps == round(0.75 * road.steps)
    head = 6 * 1024 * 64 * 128 * 8  # of a step: 1,023 pieces and the mask, of width 64
    diffusion = road.steps - road.arm_steps
    assert road.flops_credited == pytest.approx(road.flops_model - diffusion * head / 2, rel=1e-9)
    forward = road.flops_model / road.steps / 8 / 3  # of a sequence
    passes = 4 * (forward - head / 2 / 8 / 3) + 2 * forward  # of the bound, and of the exact loss, which is taken twice
    assert road.flops_evaluation == pytest.approx(2048 * passes)
    assert (road.arm_peak_lr, road.peak_lr) == pytest.approx((8e-3, 5e-3)), "at width 64"
    assert (arm.arm_share, arm.arm_steps, arm.arm_peak_lr) == (0, 0, 0)


def test_hours_are_for_every_chip_and_add_up():
    plan = sweep.plan("smdm_isoflop")
    assert plan.mfu == 0.4 and set(plan.cells[0].chip_hours) == set(planning.CHIP_NAMES)
    assert plan.chip_hours("v4") == pytest.approx(sum(cell.chip_hours["v4"] for cell in plan.cells))
    assert planning.peak_flops("h200") == hardware.peak_flops("NVIDIA H200") == 989e12


def test_each_program_is_compiled_once_for_the_fit_check(monkeypatch):
    compiled = []

    def compile(cfg, topology, part):
        compiled.append((cfg.run.microbatches, topology, part))
        return SimpleNamespace(fits=False, hbm_per_chip_bytes=SimpleNamespace(headroom=-1))

    monkeypatch.setattr(compile_check, "compile", compile)
    monkeypatch.setattr(table, "verdict", lambda report: "too large")
    plan = planning.plan(tiny_sweep(), topology="v5e-8", settings={"run.microbatches": 2})
    assert compiled == [(2, "v5e-8", "full")], "the three cells are one program"
    assert [(cell.fits, cell.fit_note) for cell in plan.cells] == [(False, "too large")] * 3


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["sweep", "plan", "smdm_isoflop", "--json", "--all"]) == 0
    printed = json.loads(capsys.readouterr().out)
    keys = "id objective preset params_non_embedding budget_flops batch_size sequence_length tokens steps".split()
    assert len(printed["cells"]) == 300 and set(keys) <= set(printed["cells"][0])
    assert printed["chip_hours"]["v5e"] == pytest.approx(sum(cell["chip_hours"]["v5e"] for cell in printed["cells"]))
    assert main(["sweep", "plan", "smdm_isoflop", "--chip", "v5p", "--price", "4.2", "--mfu", "0.5"]) == 0
    shown = capsys.readouterr().out
    plan = sweep.plan("smdm_isoflop", mfu=0.5)
    hours = plan.chip_hours("v5p")
    assert "183 cells" in shown and f"{hours:,.3g} v5p-hours at 50% MFU, {hours * 4.2:,.2f} at 4.2 an hour" in shown
    group = [cell for cell in plan.cells if (cell.objective, cell.budget_flops) == ("mdm", 6e18)]
    (row,) = [line for line in shown.splitlines() if " mdm " in line and " 6e+18 " in line]
    assert f" {len(group)} " in row and f" {sum(cell.chip_hours['v5p'] for cell in group):,.3g} " in row
    assert "3.36e+07 to 3.02e+08" in row, "of 34M to 302M parameters"
    assert main(["sweep", "plan", "smdm_isoflop", "--cells"]) == 0
    shown = capsys.readouterr().out
    assert all(cell.id in shown for cell in plan.cells)


def test_tables_are_not_cut_off_in_a_pipe(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["sweep", "plan", "smdm_isoflop", "--cells", "--price", "1"]) == 0
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the sweep first; usage: diffusionlm sweep plan NAME"),
        (["--json"], "name the sweep first"),
        (["mine.py"], "'mine.py' is a file; name the sweep that it registers too: mine.py:NAME"),
        (["smdm_isoflp"], "unknown sweep 'smdm_isoflp'; did you mean 'smdm_isoflop'"),
        (["smdm_isoflop", "--chip", "v5q"], "unknown chip 'v5q'; known: v4, v5e, "),
        (["smdm_isoflop", "--mfu", "40"], "mfu=40.0 must lie in (0, 1]"),
        (["smdm_isoflop", "--price", "-1"], "price=-1.0 must not be negative"),
        (["smdm_isoflop", "--optim.peak_lr", "1"], "optim.peak_lr=1.0 is part of what a cell measures"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert main(["sweep", "plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_impossible_mfu_is_refused():
    with pytest.raises(UserError, match="mfu=0"):
        sweep.plan("smdm_isoflop", mfu=0)
