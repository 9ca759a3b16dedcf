"""The best autoregressive share of each budget, against sweeps whose best share is known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_roads import BUDGETS, LOSS, ODDS, PARAMS, roads, truth, with_twins
from support.simulated_sweep import REPORT_TRUTHS, complete

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.bootstrap import Bootstrap, Estimate
from diffusionlm.scaling.laws.noise import seed_noise
from diffusionlm.scaling.laws.road_surfaces import fit_surfaces
from diffusionlm.scaling.laws.road_words import percent, road_warnings
from diffusionlm.scaling.laws.roads import fit_roads
from diffusionlm.scaling.laws.shares import ROAD


def fitted(results, draws=2000, seed=0):
    surfaces = fit_surfaces(results, seed_noise(results)[results[0].objective])
    return fit_roads(surfaces, Bootstrap({ROAD: surfaces.used_noise}, draws, seed), {})


def test_without_noise_it_finds_the_truth():
    for best, budget in zip(fitted(roads(noise=1e-9)).usable, BUDGETS, strict=True):
        odds = truth(budget, ODDS)
        assert best.share.value == pytest.approx(odds / (1 + odds), rel=1e-6)
        assert best.loss.value == pytest.approx(truth(budget, LOSS), rel=1e-6)
        assert best.params.value == pytest.approx(truth(budget, PARAMS), rel=1e-4)
        assert best.tokens.value == pytest.approx(budget / 6 / truth(budget, PARAMS), rel=1e-3)


@pytest.mark.slow
def test_intervals_contain_the_truth_as_often_as_they_say():
    hits = {"share": [], "loss": [], "params": [], "odds exponent": []}
    for seed in range(200):
        fit = fitted(roads(seed), draws=1000, seed=seed)
        for best in (budget.best for budget in fit.budgets if budget.best):
            odds = truth(best.budget, ODDS)
            for key, value in (
                ("share", odds / (1 + odds)),
                ("loss", truth(best.budget, LOSS)),
                ("params", truth(best.budget, PARAMS)),
            ):
                hits[key].append(not getattr(best, key).excludes(value))
        if fit.laws:
            hits["odds exponent"].append(not fit.laws["share"].exponent.excludes(ODDS[1]))
    for key, contained in hits.items():
        assert len(contained) > 150 and 0.91 < np.mean(contained), (key, np.mean(contained), len(contained))
        # Budgets do not scatter about the law here, which four of them cannot show (see `test_simulation`).
        assert key == "odds exponent" or np.mean(contained) < 0.985, (key, np.mean(contained))


def with_cell_errors(results, sd, seed):
    """Add an error to each cell that its seeds share, as a surface that is no quadratic does."""
    rng, errors = np.random.default_rng(seed), {}
    for run in results:
        errors.setdefault((run.budget, run.params, run.arm_share), sd * float(rng.standard_normal()))
    return [replace(run, loss=run.loss + errors[run.budget, run.params, run.arm_share]) for run in results]


@pytest.mark.slow
def test_intervals_hold_where_losses_leave_the_surface():
    """Errors of four times the noise, which seeds do not show."""
    hits = {"share": [], "loss": [], "params": []}
    for seed in range(150):
        fit = fitted(with_cell_errors(roads(seed), 0.02, seed), draws=1000, seed=seed)
        for best in (budget.best for budget in fit.budgets if budget.best):
            odds = truth(best.budget, ODDS)
            values = odds / (1 + odds), truth(best.budget, LOSS), truth(best.budget, PARAMS)
            for key, value in zip(hits, values, strict=True):
                hits[key].append(not getattr(best, key).excludes(value))
    for key, contained in hits.items():
        assert 0.92 < np.mean(contained) < 0.985, (key, np.mean(contained), len(contained))


def test_a_scatter_that_seeds_do_not_show_is_in_the_intervals():
    results = with_cell_errors(roads(), 0.05, 0)
    plain, bent = fitted(roads()), fitted(results)
    assert plain.used_noise == plain.noise and plain.noise.source == "seeds"
    # Three surfaces of six numbers through twelve cells each leave 18 degrees of freedom.
    assert (bent.used_noise.source, bent.used_noise.dof, bent.used_noise.cells) == ("surfaces", 18, 36)
    assert 0.03 < bent.used_noise.sd < 0.08
    for narrow, wide in zip(plain.budgets, bent.budgets, strict=True):
        assert wide.best.share.width > 3 * narrow.best.share.width
    lines = analyse(results, draws=500, full=False).warnings
    assert sum("intervals of the best shares use the scatter about them" in line for line in lines) == 1
    assert not any("which no interval contains" in line for line in lines)


def test_the_fit_of_each_surface_has_the_classic_f_test_however_cells_are_weighed():
    """Pure error is that between the seeds of a cell, and each run counts once (Draper and Smith 1998, section 2.2)."""
    results = with_cell_errors(roads(), 0.02, 0)
    fit = fitted(results)
    assert fit.used_noise.source == "surfaces"
    pure = seed_noise(results)["arm50"]
    for budget in fit.budgets:
        x = np.array([np.log(run.arm_share / (1 - run.arm_share)) for run in budget.runs])
        u = np.log([run.params for run in budget.runs]) - 13
        y = np.array([run.loss for run in budget.runs])
        design = np.stack([u**i * x**j for i, j in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))], 1)
        square_sum = float(((y - design @ np.linalg.lstsq(design, y)[0]) ** 2).sum())
        within = sum(
            float(((y[same] - y[same].mean()) ** 2).sum())
            for cell in {(run.params, run.arm_share) for run in budget.runs}
            for same in [[(run.params, run.arm_share) == cell for run in budget.runs]]
        )
        ratio = (square_sum - within) / (12 - 6) / pure.sd**2
        assert budget.lack_of_fit.p == pytest.approx(stats.f.sf(ratio, 6, pure.dof))


def test_shares_far_from_the_best_do_not_bend_the_surface():
    """The loss of a share of 99% of which the truth is no quadratic; its odds are some 50 times the best."""
    far = roads(shares=(0.25, 0.5, 0.75, 0.99), noise=1e-9)
    far = [replace(run, loss=run.loss + 0.3) if run.arm_share == 0.99 else run for run in far]
    for best, budget in zip(fitted(far).usable, BUDGETS, strict=True):
        odds = truth(budget, ODDS)
        assert best.share.value == pytest.approx(odds / (1 + odds), rel=1e-6)
    analysis = analyse(far, draws=500, full=False)
    [line] = [line for line in analysis.warnings if "the share of 99% is in no surface" in line]
    where, _, text = line.partition(": ")
    assert where == "roads at {:.3g}, {:.3g} and {:.3g} FLOPs".format(*BUDGETS) and "factor of 10" in text
    for fit in analysis.roads.budgets:
        assert [at.loss is None for at in fit.shares] == [False, False, False, True]
    two = fitted([*far, *(replace(run, arm_share=0.005) for run in far if run.arm_share == 0.99)])
    [line] = [line for line in road_warnings(two) if "in no surface" in line]
    assert "the share of 0.5% and 99% is in no surface, as its odds differ" in line
    # Two near shares determine no surface, so all three are used.
    few = fitted([run for run in far if run.arm_share != 0.5])
    assert all(fit.distant == () and fit.surface for fit in few.budgets)


def test_the_noise_of_roads_may_be_the_scatter_about_their_surfaces():
    single = [run for run in roads(noise=0.02) if run.seed == 0]
    of_roads = analyse(single, noise="residuals", draws=500, full=False).roads
    squares = sum(float((fit.surface.residuals**2).sum()) for fit in fitted(single).budgets)
    # Three surfaces of six numbers through twelve runs each.
    assert of_roads.noise.source == "residuals" and of_roads.noise.dof == 18
    assert of_roads.noise.sd == pytest.approx(np.sqrt(squares / 18))
    assert [fit.lack_of_fit.p for fit in of_roads.budgets] == [None] * 3, "residuals are not tested against themselves"


def test_an_error_that_all_losses_share_does_not_blur_how_the_loss_moves():
    """A shift of all losses alike changes L* and hardly its exponent: here by 0.011 of 4 nats, at every budget."""

    def interval(offsets):
        shared = [replace(run, loss_per_draw=tuple(run.loss + x for x in offsets)) for run in roads(noise=0.002)]
        laws = fitted(shared).laws
        assert laws
        low, high = laws["loss"].exponent.interval
        return high - low

    # A draw of its own at each budget would make it about ten times as wide.
    assert interval(0.022 * np.array([-1.2, -0.4, 0.4, 1.2])) < 4 * interval(np.zeros(4))


def test_one_noise_is_that_of_all_roads_and_of_nothing_else():
    noises = seed_noise(with_twins())
    of_roads = {name: noise for name, noise in noises.items() if name not in REPORT_TRUTHS}
    assert len(set(of_roads.values())) == 1 and next(iter(of_roads.values())).dof == 6
    alone = seed_noise(complete())
    assert {name: noises[name] for name in REPORT_TRUTHS} == alone
    single = [r for r in roads() if r.seed == 0]
    assert set(seed_noise(single).values()) == {None}
    assert fitted(single).budgets[0].best.share.interval is None
    assert any("roads: no intervals" in line for line in analyse(single, full=False).warnings)


@pytest.mark.parametrize(("odds", "end", "more"), [(30.0, "largest", "larger"), (0.05, "smallest", "smaller")])
def test_a_best_share_beyond_the_shares_is_not_determined(odds, end, more):
    analysis = analyse(with_twins(odds=(odds, 0.0)), draws=500, full=False)
    assert analysis.roads.usable == [] and analysis.roads.laws == {}
    assert analysis.verdict.startswith("The best autoregressive share is not determined at 5e+12 FLOPs (")
    [line] = [
        line for line in analysis.warnings if line.startswith("roads at ") and "is the best that was measured" in line
    ]
    where, budgets = line.split(": ")[0], [f"{fit.budget:.3g}" for fit in analysis.roads.budgets]
    assert where == "roads at {}, {} and {} FLOPs".format(*budgets)
    assert f"the {end} share" in line and f"run {more} ones" in line
    assert "road" not in {gap.objective for gap in analysis.gaps}
    assert {"arm50", "mdm"} <= {gap.objective for gap in analysis.gaps}, "so each share is compared by itself"


def test_noise_that_hides_the_share_is_named():
    analysis = analyse(with_twins(seed=3, noise=0.3), draws=500, full=False)
    assert not any(best.share.bounded for best in analysis.roads.usable) and len(analysis.roads.usable) < 3
    assert "is not determined" in analysis.verdict


def test_a_best_share_that_the_shares_do_not_bound_is_said_with_its_interval():
    """The minimum lies within the shares, and noise lets its interval go far beyond them."""
    analysis = analyse(with_twins(seed=4, noise=0.03), draws=500, full=False)
    [fit] = [fit for fit in analysis.roads.budgets if not fit.best.usable]
    low, high = (100 * end for end in fit.best.share.interval)
    assert fit.best.inside and low < 20 and high > 95  # of shares of 25 to 90%
    words = f"the best share, {100 * fit.best.share.value:.0f}% [0%, 100%], so run more seeds, or shares further apart"
    assert f"at 1.6e+13 FLOPs (the shares that were run do not bound {words})" in analysis.verdict
    assert "the surface has no minimum" not in "".join(analysis.warnings)


@pytest.mark.parametrize("loss", [3.0, 4.1, 2.7])
def test_roads_whose_losses_are_all_equal_have_no_best_share(loss):
    """A surface through them has the minimum of rounding errors."""
    analysis = analyse([replace(run, loss=loss) for run in roads()], draws=50, full=False)
    assert not analysis.roads.usable and not any(fit.surface for fit in analysis.roads.budgets)
    assert "all losses are equal, so see that each run has its own" in analysis.verdict
    assert not any(line.startswith("roads: losses leave") for line in analysis.warnings)


def test_too_few_combinations_are_named():
    few = [r for r in roads() if r.arm_share in (0.5, 0.75)]
    analysis = analyse(few, draws=500, full=False)
    assert {fit.surface for fit in analysis.roads.budgets} == {None}
    assert "6 combinations of size and share do not determine a quadratic in both" in analysis.verdict
    alone = analyse(few[:1], draws=10, full=False).verdict
    assert "1 combination of size and share does not determine a quadratic in both" in alone


@pytest.mark.parametrize(
    ("share", "words"), [(1e-4, "0%"), (0.0041, "0.4%"), (0.012, "1%"), (0.179, "18%"), (0.996, "100%")]
)
def test_a_share_below_a_percent_is_not_none(share, words):
    assert percent(Estimate(share)) == words
    assert percent(Estimate(share, 0.003, share)) == f"{words} [0.3%, {words}]"


@pytest.mark.slow
def test_the_road_is_compared_with_both_objectives_at_equal_compute():
    """The intervals of its differences and gaps contain the truth, more often as laws have but three budgets."""
    level, exponent = REPORT_TRUTHS["arm"].loss
    contained = []
    for seed in range(40):
        analysis = analyse(with_twins(seed, noise=0.002), draws=500, seed=seed, full=False)
        for name, rows in analysis.roads.differences.items():
            assert [budget for budget, _ in rows] == list(BUDGETS)
            for budget, estimate in rows:
                assert estimate.high - estimate.low < 0.1, name
                expected = truth(budget, LOSS) - truth(budget, REPORT_TRUTHS[name].loss)
                contained.append(not estimate.excludes(expected))
        gaps = {gap.objective: gap for gap in analysis.gaps}
        assert set(gaps) == {"mdm", "road"}
        for budget, estimate in gaps["road"].at_own:
            needed = 1e13 * (truth(budget, LOSS) / level) ** (1 / exponent)
            assert estimate.high / estimate.low < 1.5
            contained.append(not estimate.excludes(budget / needed))
    assert len(contained) == 40 * 9 and np.mean(contained) > 0.9


def test_the_skill_that_is_kept_is_that_of_the_best_size():
    results = [
        replace(r, autoregressive_loss=3.0 + r.params / 1e7, first_autoregressive_loss=None) for r in roads(noise=1e-6)
    ]
    for fit in fitted(results).budgets:
        for at in fit.shares:
            runs = [r for r in fit.runs if r.arm_share == at.share]
            best = min(runs, key=lambda r: r.loss)
            assert (at.best_params, at.runs) == (best.params, len(runs))
            assert at.autoregressive_loss == pytest.approx(3.0 + best.params / 1e7)
            assert at.first_autoregressive_loss is None


@pytest.mark.parametrize("noise", [0.005, "residuals"])
def test_a_noise_that_no_seeds_measured_has_no_words_about_seeds(noise):
    lines = "\n".join(analyse(with_twins(), noise=noise, draws=200, full=False).warnings)
    assert "seeds of their own" not in lines and "roads: no cell at" not in lines


def test_no_single_share_is_a_candidate_for_the_next_cell():
    assert not any(fit.candidates for fit in analyse(with_twins(), draws=200).objectives.values() if fit.arm_share)


def test_a_surface_that_is_no_quadratic_is_named():
    bent = [replace(r, loss=r.loss + 0.1 * (r.arm_share == 0.5) * (r.params > 5e5)) for r in roads()]
    analysis = analyse(bent, draws=500, full=False)
    [line] = [line for line in analysis.warnings if "losses leave the surface by so much" in line]
    for fit in analysis.roads.budgets:
        assert f"{fit.budget:.3g}" in line and f"({fit.lack_of_fit.sd:.3g} nats, p " in line
    assert not any("leave the surface" in line for line in analyse(roads(), draws=500, full=False).warnings)


def test_a_sweep_without_roads_is_analysed_as_before():
    analysis = analyse(complete(), draws=500, full=False)
    assert analysis.roads is None and list(analysis.objectives) == ["mdm", "arm"]
    names = list(analyse(with_twins(), draws=500, full=False).objectives)
    assert names == ["mdm", "arm25", "arm50", "arm75", "arm90", "arm"]
