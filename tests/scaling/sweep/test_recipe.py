"""Cells of sweeps: the steps of SMDM's table, budgets, and what a cell's identity is."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from diffusionlm import config_io, presets
from diffusionlm.errors import UserError
from diffusionlm.registry import sweeps
from diffusionlm.scaling import commands as sweep
from diffusionlm.scaling.sweep.recipe import LEAST_STEPS, ScalingRecipe, Sweep, grid, solve
from diffusionlm.training.parts import config_of
from diffusionlm.training.programs import structure

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "isoflop_cpu" / "results.json"

# Steps of SMDM's released code at 6, 10, 30, 60 and 100 e18 FLOPs, batch 256 (train_mdm.py:41-62), for a few sizes.
SMDM_STEPS = {
    "smdm_6m": (303004, 505007, 1515023, 3030046, 5050076),
    "smdm_75m": (25300, 42167, 126502, 253005, 421676),
    "smdm_170m": (11226, 18710, 56132, 112264, 187107),
    "smdm_336m": (5683, 9472, 28418, 56836, 94727),
    "smdm_1028m": (1855, 3093, 9279, 18559, 30932),
    "smdm_2121m": (899, 1498, 4495, 8991, 14985),
}
RECIPE = ScalingRecipe(name="test", sequence_length=128, batch_size=16, peak_lr=1e-3, convention="model")
MODEL = presets.get("smdm_6m")


@pytest.fixture(params=sweep.names())
def shipped(request):
    return sweep.get(request.param)


def test_smdms_sweep_has_the_steps_of_its_code():
    cells = sweep.get("smdm_isoflop").select(everything=True)
    assert len(cells) == 30 * 5 * 2
    by_key = {(cell.objective, cell.preset, cell.budget): cell for cell in cells}
    for preset, expected in SMDM_STEPS.items():
        for budget, steps in zip((6e18, 1e19, 3e19, 6e19, 1e20), expected, strict=True):
            for objective in ("mdm", "arm"):
                cell = by_key[objective, preset, budget]
                assert cell.steps == steps
                assert cell.config.optim.warmup_steps == max(100, steps // 100)
                assert cell.config.optim.peak_lr == 4e-4 and cell.config.optim.final_lr == pytest.approx(4e-5)
    assert {cell.config.optim.peak_lr for cell in sweep.get("smdm_isoflop_code").cells} == {2e-4}


def test_smdms_sweep_is_near_its_published_optima_by_default():
    """Optima of Figure 1, digitised: 84M and 479M for MDMs at 6e18 and 1e20, 153M and 1009M for ARMs."""
    published = {("mdm", 6e18): 84e6, ("mdm", 1e20): 479e6, ("arm", 6e18): 153e6, ("arm", 1e20): 1009e6}
    chosen = sweep.get("smdm_isoflop")
    for (objective, budget), optimum in published.items():
        for cells, near in ((chosen.cells, True), (chosen.others, False)):
            ratios = [c.params / optimum for c in cells if (c.objective, c.budget) == (objective, budget)]
            # The law through the published points is off by up to a tenth at single ones.
            assert ratios and all((0.22 < ratio < 4.5) if near else not 0.28 < ratio < 3.6 for ratio in ratios)


def test_shipped_sweeps_meet_their_budgets(shipped):
    cells = shipped.select(everything=True)
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.flops == pytest.approx(cell.budget, rel=0.01) and cell.flops <= cell.budget
        assert cell.steps >= LEAST_STEPS
        assert cell.config.model.causal == (cell.objective == "arm")


def test_shipped_sweeps_can_be_fitted(shipped):
    """But for tuning: at least five sizes at each of at least four budgets, of both objectives.

    A sweep of roads has those cells among its others.
    """
    if shipped.name.endswith("_tuning"):
        assert len({cell.recipe for cell in shipped.cells}) > 1
        return
    if shipped.name.startswith("road_"):
        shipped = replace(shipped, cells=shipped.others)
    sizes = {}
    for cell in shipped.cells:
        sizes.setdefault((cell.objective, cell.budget), set()).add(cell.preset)
    assert min(map(len, sizes.values())) >= 5
    for objective in ("mdm", "arm"):
        budgets = [budget for o, budget in sizes if o == objective]
        assert len(budgets) >= 4 and max(budgets) / min(budgets) > 15


@pytest.mark.parametrize(("convention", "random_length"), [("6nd", 0.0), ("6nd", 0.01), ("model", 0.0)])
def test_conventions(convention, random_length):
    recipe = replace(RECIPE, convention=convention, random_length=random_length)
    cell = solve(recipe, "mdm", "smdm_6m", MODEL, 1e15)
    kept = 128 * (1 - random_length) + 64.5 * random_length  # the mean of 1..128 is 64.5
    assert cell.tokens == pytest.approx(cell.steps * 16 * kept, rel=1e-9, abs=1)
    if convention == "6nd":
        assert cell.params == 6_294_784  # SMDM's count
        assert cell.flops == pytest.approx(6 * 6_294_784 * cell.steps * 16 * kept)
    else:
        assert cell.params == 6_294_784 + 32000 * 256
        per_token = 6 * (6_294_784 - 13 * 256 + 32000 * 256) + 12 * 6 * 128 * 256  # norms are no matmuls
        assert cell.flops == pytest.approx(cell.steps * 16 * 128 * per_token, rel=1e-12)
    twin = solve(recipe, "arm", "smdm_6m", MODEL, 1e15)
    assert twin.params == cell.params
    if not random_length:
        assert (twin.steps, twin.flops) == (cell.steps, cell.flops), "twins are comparable"


def test_the_learning_rate_follows_the_width():
    recipe = replace(RECIPE, lr_width=128, lr_exponent=-0.5)
    assert recipe.lr(replace(MODEL, d_model=128)) == 1e-3
    assert recipe.lr(replace(MODEL, d_model=512)) == pytest.approx(5e-4)
    cell = solve(replace(recipe, lr_width=64), "mdm", "x", replace(MODEL, d_model=256), 1e15)
    assert cell.config.optim.peak_lr == pytest.approx(5e-4)
    assert cell.config.optim.final_lr == pytest.approx(5e-5)


@pytest.mark.parametrize("name", ["road_cpu", "road_h200"])
def test_a_shipped_road_determines_its_best_share(name):
    """A quadratic in size and share has six numbers; a fifth was the best share wherever one was determined."""
    shipped = sweep.get(name)
    points = {}
    for cell in shipped.cells:
        points.setdefault(cell.budget, set()).add((cell.arm_share, cell.params))
    assert len(points) >= 3
    for at_budget in points.values():
        shares = [share for share, _ in at_budget]
        assert set(shares) >= {0.1, 0.25, 0.5} and len(at_budget) > 6
        assert min(map(shares.count, shares)) >= 2 and len({params for _, params in at_budget}) >= 3
    repeated = [cell for cell in shipped.cells if cell.seed == 2]
    assert len(repeated) >= 2, "three seeds in two cells, for intervals"
    twins = {(cell.objective, cell.budget) for cell in shipped.others}
    assert {(objective, budget) for budget in points for objective in ("mdm", "arm")} <= twins


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_the_first_part_of_a_road_is_the_autoregressive_recipe(share):
    arm = replace(RECIPE, peak_lr=8e-3, lr_width=64, lr_exponent=-0.5)
    recipe = replace(arm, arm_share=share, arm_peak_lr=arm.peak_lr, peak_lr=5e-3)
    cell = solve(recipe, "mdm", "smdm_6m", MODEL, 1e15)
    twin = solve(arm, "arm", "smdm_6m", MODEL, 1e15)
    steps = cell.config.diffusion.arm_steps
    assert steps == pytest.approx(share * cell.steps, abs=0.5) and cell.arm_share == share
    assert cell.config.diffusion.alignment == "shifted" and cell.config.diffusion.anneal_steps == 0
    assert (cell.steps, cell.flops, cell.params) == (twin.steps, twin.flops, twin.params), "at equal FLOPs"
    first, alone = config_of(cell.config, "autoregressive"), twin.config
    assert first.objective == "arm" and first.run.steps == steps
    assert first.optim.peak_lr == alone.optim.peak_lr == pytest.approx(8e-3 * (256 / 64) ** -0.5)
    assert cell.config.optim.peak_lr == pytest.approx(2.5e-3)
    assert cell.config.optim.warmup_steps <= min(steps, cell.steps - steps) / 4
    opened = solve(replace(recipe, anneal_steps=7), "mdm", "smdm_6m", MODEL, 1e15)
    assert opened.config.diffusion.anneal_steps == 7 and opened.id != cell.id
    assert cell.id.startswith({0.25: "arm25_smdm_6m_", 0.9: "arm90_smdm_6m_"}[share])


def test_cells_of_a_shape_share_a_program_whatever_their_share():
    cells = [solve(replace(RECIPE, arm_share=share), "mdm", "x", MODEL, 1e15) for share in (0.25, 0.5)]
    assert structure(cells[0].config) == structure(cells[1].config) and cells[0].id != cells[1].id


def test_the_cells_of_the_committed_results_keep_their_ids():
    for name, shipped in (("isoflop_cpu", sweep.get("isoflop_cpu").cells), ("road_cpu", sweep.get("road_cpu").others)):
        assert {cell.id for cell in shipped} == {row["id"] for row in json.loads(RESULTS.read_text())}, name
    roads = json.loads((RESULTS.parents[1] / "road_cpu" / "results.json").read_text())
    assert {row["id"] for row in roads} <= {cell.id for cell in sweep.get("road_cpu").select(everything=True)}


def test_a_share_that_leaves_no_step_for_a_part_is_refused():
    with pytest.raises(UserError, match=r"arm_share=0.0001 of \d+ steps is 0, which leaves no step for one of the two"):
        solve(replace(RECIPE, arm_share=1e-4), "mdm", "smdm_6m", MODEL, 1e14)
    with pytest.raises(UserError, match="arm smdm_6m at .*: arm_share=0.5 of recipe 'test' is for the objective mdm"):
        solve(replace(RECIPE, arm_share=0.5), "arm", "smdm_6m", MODEL, 1e14)


def test_each_objective_has_its_tuned_learning_rate():
    """The rates of experiments/LOG.md, at width 64; a GPU's sweep has them too, as nothing was tuned for it."""
    tuned = {"arm": 8e-3, "mdm": 3.2e-3}
    for name in ("isoflop_cpu", "isoflop_h200"):
        for cell in sweep.get(name).select(everything=True):
            rate = tuned[cell.objective] * (cell.config.model.d_model / 64) ** -0.75
            assert cell.config.optim.peak_lr == pytest.approx(rate), cell.id


def test_the_docstring_of_a_sweep_says_how_much_text_is_one_epoch():
    cells = sweep.get("isoflop_h200").select(everything=True)
    most = max(cells, key=lambda cell: cell.tokens)
    others = max(cell.tokens for cell in cells if (cell.preset, cell.budget) != (most.preset, most.budget))
    description = sweeps.builder("isoflop_h200").__doc__
    assert (most.preset, most.budget) == ("gpu_6m", 3e16) and "gpu_6m at 3e16" in description
    assert 615e6 < most.tokens < 616e6 and "616 million" in description
    assert 339e6 < others < 340e6 and "340 million" in description


def test_warm_up_is_at_most_a_quarter():
    short = solve(replace(RECIPE, warmup_steps=2000), "mdm", "smdm_6m", MODEL, 2e13)
    assert short.steps < 1000 and short.config.optim.warmup_steps == short.steps // 4


def test_identity_is_the_science_and_nothing_else():
    cell = solve(RECIPE, "mdm", "smdm_6m", MODEL, 1e15)
    moved = config_io.with_fields(cell.config, {"data.path": "elsewhere", "mesh.tensor": 2, "run.microbatches": 2})
    assert replace(cell, config=moved).id == cell.id
    others = [
        solve(RECIPE, "mdm", "smdm_6m", MODEL, 1e15, seed=1),
        solve(RECIPE, "mdm", "smdm_6m", MODEL, 1.1e15),
        solve(RECIPE, "arm", "smdm_6m", MODEL, 1e15),
        solve(replace(RECIPE, peak_lr=2e-3), "mdm", "smdm_6m", MODEL, 1e15),
        solve(replace(RECIPE, dtype="float32"), "mdm", "smdm_6m", MODEL, 1e15),
    ]
    assert len({cell.id, *(other.id for other in others)}) == 6
    assert solve(RECIPE, "mdm", "smdm_6m", MODEL, 1e15).id == cell.id


def test_a_budget_that_pays_for_too_few_steps_is_refused():
    with pytest.raises(UserError, match=r"mdm smdm_6m at 1e\+12 FLOPs: the budget pays for \d+ steps of 16 x 128"):
        solve(RECIPE, "mdm", "smdm_6m", MODEL, 1e12)
    for budget in (float("nan"), float("inf"), 0.0, -1e15):
        with pytest.raises(UserError, match=f"mdm smdm_6m: budget={re.escape(str(budget))} must be a positive, finite"):
            solve(RECIPE, "mdm", "smdm_6m", MODEL, budget)
    with pytest.raises(UserError, match=r"and 3 more cells like it"):
        grid(RECIPE, objectives=("mdm", "arm"), sizes={"a": MODEL, "b": MODEL}, budgets=(1e12, 1e15))


def test_each_cell_is_selected_once_and_cheap_ones_first():
    cells = grid(RECIPE, objectives=("mdm", "arm"), sizes={"a": MODEL}, budgets=(2e15, 1e15), seeds=(0, 1))
    chosen = Sweep(tuple(cells) + tuple(cells[:2]), others=tuple(cells[:1])).select(everything=True)
    assert len(chosen) == 8
    assert [cell.budget for cell in chosen] == sorted(cell.budget for cell in cells)


def test_planning_starts_no_backend():
    code = "import sys; from diffusionlm.registry import sweeps; sweeps.get('smdm_isoflop').select(True); "
    code += "sys.exit('jax' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_sweep_gets_a_suggestion():
    with pytest.raises(UserError, match="unknown sweep 'smdm_isoflopp'; did you mean 'smdm_isoflop'"):
        sweep.get("smdm_isoflopp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "wsd"}, "schedule='wsd' must be one of cosine, constant"),
        ({"lr_exponent": -0.5}, "lr_exponent=-0.5 needs lr_width"),
        ({"sequence_length": "64"}, "sequence_length='64' must be of type int"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"random_length": 2.0}, r"random_length=2.0 must be a fraction in \[0, 1\]"),
        ({"random_length": 1.5}, r"random_length=1.5 must be a fraction in \[0, 1\]"),
        ({"lr_width": -1}, "lr_width=-1 must not be negative"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction=1.5 must be a fraction in \[0, 1\]"),
        ({"eval_draws": 1}, "eval_draws=1 must be at least 2"),
        ({"arm_share": 1.0}, r"arm_share=1.0 must lie in \[0, 1\); all steps are the objective arm"),
        ({"arm_peak_lr": 8e-3}, "arm_peak_lr=0.008 needs arm_share, the share of the steps that are autoregressive"),
        ({"anneal_steps": 10}, "anneal_steps=10 needs arm_share"),
        ({"random_length": float("nan")}, "random_length=nan must be a finite number"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(changes, message):
    with pytest.raises(UserError, match=f"recipe 'r': {message}"):
        ScalingRecipe(**{"name": "r", "sequence_length": 64, "batch_size": 8, "peak_lr": 1e-3} | changes)


def test_a_sweep_needs_cells_that_are_comparable():
    with pytest.raises(UserError, match="sweep 'none' has no cells"):
        Sweep((), name="none")
    short, long = (
        grid(replace(RECIPE, sequence_length=length), objectives=("mdm",), sizes={"a": MODEL}, budgets=(1e15,))
        for length in (64, 128)
    )
    with pytest.raises(UserError, match="cells of data.sequence_length 64 and 128, which are not comparable"):
        Sweep(tuple(short + long), name="mixed")
