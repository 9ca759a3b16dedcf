"""Points of others are read whole or refused in one line that names the row; doubtful rows are named in warnings."""

import math
from pathlib import Path

import numpy as np
import pytest

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep import points
from diffusionlm.scaling.sweep.point_groups import groups

FIXTURES = Path(__file__).parents[2] / "fixtures" / "scaling"
COLUMNS = "objective,budget_flops,params,tokens,loss"
ROW = "arm,6e18,1e8,1e10,3.1"


def written(tmp_path, *lines, columns=COLUMNS):
    path = tmp_path / "points.csv"
    path.write_text("\n".join(["# a comment", columns, *lines]) + "\n")
    return path


def surface(budgets=(1e18, 1e19, 1e20), sizes=5, **columns):
    """Return the columns of exact points of a law, and further columns that are the same in all rows."""
    log_c = np.repeat(np.log(budgets), sizes)
    n = np.tile(np.geomspace(0.4, 2.5, sizes), len(budgets)) * 0.1 * np.exp(log_c / 2)
    d = np.exp(log_c) / (6 * n)
    table = {"budget_flops": np.exp(log_c), "params": n, "tokens": d, "loss": 1.69 + 406 / n**0.34 + 410 / d**0.28}
    table |= {"objective": ["arm"] * len(n)}
    return table | {name: [value] * len(n) for name, value in columns.items()}


def the_group(table, **options):
    [group] = groups(points.read(table), **options)
    return group


def test_a_file_is_read_as_it_is_written():
    table = points.read(FIXTURES / "cs336_synthetic.csv")
    group = the_group(FIXTURES / "cs336_synthetic.csv", counted="all of them")
    assert len(group.results) == 72 and not group.left_out and not group.warnings
    assert table.header[0].endswith("MIT") and "MIT" in group.context["comments of the file"]
    first = group.results[0]  # line 4 of the file
    assert first.id == "cs336_synthetic.csv line 4" and (first.params, first.tokens) == (49999999, 20000000400)
    assert first.loss == pytest.approx(2.69 + 1606.4 / first.params**0.34 + 3210.7 / first.tokens**0.36, rel=1e-8)
    assert group.context["parameters"] == "all of them"


def test_bits_become_nats_and_the_page_says_so():
    nats, bits = surface(), surface()
    bits["loss"] = bits["loss"] / math.log(2)
    [group] = groups(points.read(bits, "bits"), unit="bits")
    np.testing.assert_allclose([run.loss for run in group.results], nats["loss"])
    assert group.context["loss"].startswith("given in bits")


def test_a_data_frame_is_a_table_whose_missing_values_are_missing():
    pandas = pytest.importorskip("pandas", reason="pandas is in no extra, and only this test wants it")
    frame = pandas.DataFrame(surface()).rename(columns={"budget_flops": "budget"})
    frame["corpus"] = ["web"] * 10 + [None] * 5
    frame.loc[14, "budget"] = np.nan
    web, other = groups(points.read(frame))
    assert len(web.results) == 10 and web.context["corpus"] == "web"
    assert np.isnan(other.results[-1].budget) and other.results[0].budget == pytest.approx(1e20)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["arm,-6e18,1e8,1e10,3.1"], ["points.csv line 3: budget_flops=-6e+18 must be a plain number above 0"]),
        (["arm,6e18,1e8,1e10,-3.1"], ["points.csv line 3: loss=-3.1 must be a plain number above 0"]),
        ([ROW, "", "arm,6e18,nan,1e10,3.1"], ["points.csv line 5: params=nan"]),
        (["arm,6e18,0.5,1e10,3.1"], ["points.csv line 3: params=0.5", "counted one by one"]),
        (["arm,6e18,1e8,inf,3.1"], ["points.csv line 3: tokens=inf"]),
        (["arm,6e18,1e8,,3.1"], ["points.csv line 3: tokens is empty"]),
        (
            ["arm,6e18,1e8,1e10,3.1 nats"],
            ["line 3: loss='3.1 nats' must be a plain number above 0, such as"],
        ),
        (['arm,6e18,"100,000",1e10,3.1'], ["line 3: params='100,000' must be a plain number of at least 1, such as"]),
        (["amr,6e18,1e8,1e10,3.1"], ["points.csv line 3: unknown objective 'amr'; did you mean 'arm'"]),
        (["arm,6e18,1e8,3.1"], ["points.csv line 3 has 4 cells, but there are 5 columns"]),
        (['"arm', "x"], ["points.csv line 3 is no line of CSV"]),
        ([], ["points.csv has no row below its columns"]),
        (["arm,6e18,1e8,1e10,nan", "arm,6e18,1e8,1e11,"], ["no row to fit: all 2 are left out (no finite loss: 2)"]),
    ],
)
def test_a_wrong_row_is_one_line_that_names_it(tmp_path, lines, words):
    with pytest.raises(UserError) as error:
        groups(points.read(written(tmp_path, *lines)))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; give a line of columns"),
        ("# nothing\n", "nothing but comments"),
        ("objective,params,tokens,Loss\n", "no column 'loss'; did you mean 'Loss'?; needed"),
        ("objective,params,tokens,flops\n", "no column 'loss'; it has: flops, objective, params, tokens; needed"),
        ("objective;params;tokens;loss\n", "separated by ';'"),
        ("objective,params,tokens,loss,loss\n", "two columns 'loss'"),
        ("objective,params,tokens,loss,budget,budget_flops\n", "two columns 'budget_flops'"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, words):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(UserError, match=r"^\S+points.csv [^\n]*$") as error:
        points.read(tmp_path / "points.csv")
    assert words in str(error.value)
    with pytest.raises(UserError, match="cannot read .*none.csv: No such file"):
        points.read(tmp_path / "none.csv")


def test_rows_are_left_out_by_their_flags(tmp_path):
    rows = [f"arm,6e18,{n}e8,1e10,3.{n},{flag}" for n, flag in enumerate(("", "outlier", "synthetic", "", "chosen"), 1)]
    path = written(tmp_path, *rows, columns=COLUMNS + ",flag")
    group = the_group(path)
    assert [run.params for run in group.results] == [1e8, 3e8, 4e8]
    assert [(left.run.params, left.reason) for left in group.left_out] == [(2e8, "flag outlier"), (5e8, "flag chosen")]
    assert [run.params for run in the_group(path, use=["chosen", "unflagged"]).results] == [1e8, 4e8, 5e8]
    with pytest.raises(UserError, match="use='chsen' is the flag of no row .*; did you mean 'chosen'"):
        the_group(path, use=["chsen"])


def test_sources_and_corpora_are_groups():
    first, second = surface(corpus="web", source="a"), surface(corpus="code", source="a")
    table = {name: [*first[name], *second[name]] for name in first}
    built = groups(points.read(table))
    assert [group.name for group in built] == ["a web", "a code"] and all(len(g.results) == 15 for g in built)
    assert not any(group.warnings for group in built)


def test_corpora_without_a_column_are_named_and_are_no_seeds(tmp_path):
    tables = [surface() for _ in range(6)]
    for i, table in enumerate(tables):
        table["loss"] = table["loss"] + 0.1 * i
    group = the_group({name: np.concatenate([table[name] for table in tables]) for name in tables[0]})
    [warning] = group.warnings
    assert warning.startswith("records 0, 15, 30, 45 and 2 more: one point (arm, ")
    assert "14 more points likewise" in warning and "corpus" in warning
    assert len(group.results) == 90


def test_rows_that_are_equal_in_all_are_left_out_but_seeds_are_not(tmp_path):
    group = the_group(written(tmp_path, ROW, "arm,6e18,2e8,5e9,3.0", ROW, "arm,6e18,4e8,25e8,3.2"))
    assert len(group.results) == 3 and group.left_out[0].reason == "the same as line 3"
    assert "points.csv line 5: the same in every column" in group.warnings[0]
    seeds = [f"{ROW},{seed}" for seed in range(3)]
    group = the_group(written(tmp_path, *seeds, columns=COLUMNS + ",seed"))
    assert [run.seed for run in group.results] == [0, 1, 2] and not any("same" in line for line in group.warnings)


def test_a_loss_in_another_unit_is_named():
    table = surface()
    assert not the_group(table).warnings
    table["loss"][7] /= math.log(2)
    [warning] = the_group(table).warnings
    assert warning.startswith("record 7: its loss is 1.44 times that of its neighbours, as bits are of nats")
    for factor, words in ((0.2, "less than any model of text"), (6.0, "more than guessing has")):
        other = surface()
        other["loss"] = other["loss"] * factor
        assert any(words in line for line in the_group(other).warnings)


def test_a_whole_budget_in_bits_is_named():
    table = surface()
    table["loss"][5:10] /= math.log(2)
    assert any("as bits are of nats" in line for line in the_group(table).warnings)


def test_many_rows_in_bits_are_one_warning():
    table = surface(sizes=9)
    table["loss"][::2] /= math.log(2)
    [warning] = the_group(table).warnings
    assert "records 1, 2, 3, 4 and 17 more: their losses are 0.69 to 1.44 times that of their neighbours" in warning


def test_one_budget_and_losses_that_are_no_bounds_are_named():
    [warning] = the_group(surface(budgets=(1e19,))).warnings
    assert warning == "record 0 and all others of arm: one budget, 1e+19 FLOPs, and a law needs two"
    table = surface()
    twins = {name: [*values, *values] for name, values in table.items()} | {"objective": ["arm"] * 15 + ["mlm"] * 15}
    [warning] = the_group(twins).warnings
    assert warning.startswith("record 15 and all others of mlm: ") and "two quantities" in warning
    assert not the_group(twins | {"objective": ["arm"] * 15 + ["mdm"] * 15}).warnings


def test_counts_in_millions_are_named():
    table = surface()
    table["tokens"] = table["tokens"] / 1e6
    warning, rounded = the_group(table).warnings
    assert "C / (N D) is 6e+06, where 6 is usual" in warning
    assert rounded.startswith("records 2, 4 and 8: tokens=1666.67 is no whole number, and rounded to 1667")
    table = surface()
    table["tokens"][3] *= 10
    [warning] = the_group(table).warnings
    assert warning.startswith("record 3: C / (N D) is 0.6, but 6 in the middle")


def test_counts_in_millions_are_named_where_there_is_no_compute_to_compare_with():
    table = {name: np.round(values) if name in ("params", "tokens") else values for name, values in surface().items()}
    del table["budget_flops"]
    assert not the_group(table).warnings
    for scales, words in (
        ({"tokens": 1e-6}, "records 0, 1, 2, 3 and 11 more: D / N is 0.000104, and published runs have"),
        ({"params": 1e-6}, "D / N is"),
        ({"params": 1e-6, "tokens": 1e-6}, "6 N D is 1e+06 FLOPs, no more than a second of one core"),
    ):
        other = table | {name: np.ceil(table[name] * scale) for name, scale in scales.items()}
        assert any(words in line for line in the_group(other).warnings), the_group(other).warnings


def test_real_runs_are_in_the_range_of_tokens_per_parameter(data_dir):
    names = ("epoch_chinchilla", "kempner_loss_to_loss", "kyo_chinchilla", "llama3", "mdm_prime_v2", "open_athena")
    names += ("openeurollm_smoothed", "porian", "protein_lm", "steplaw_dense")
    tables = [points.read(Path(data_dir) / "laws" / f"{name}.csv") for name in names]
    ratios = [row.point.tokens / row.point.params for table in tables for row in table.rows]
    assert (min(ratios), max(ratios)) == pytest.approx((0.006, 19_000), rel=0.03)
    for table in tables:
        for group in groups(table):
            assert not any("D / N is" in line or "6 N D is" in line or "whole" in line for line in group.warnings)


def test_counts_that_are_not_whole_are_rounded_and_the_page_says_so():
    table = {"objective": ["arm"] * 2, "params": [25.5, 1e8], "tokens": [2e9, 10204081632.7], "loss": [3.1, 3.0]}
    group = the_group(table)
    assert [(run.params, run.tokens) for run in group.results] == [(26, 2 * 10**9), (10**8, 10204081633)]
    assert group.context["rounded"] == "N or D of 2 rows, to whole numbers"
    [line] = [line for line in group.warnings if "no whole number" in line]  # a tenth of a token is nothing
    assert line == ("record 0: params=25.5 is no whole number, and rounded to 26: are params counted one by one?")


def test_a_list_of_records_is_a_table():
    table = surface(seed=3)
    columns = [table[name] for name in table]
    records = [dict(zip(table, values, strict=True)) for values in zip(*columns, strict=True)]
    del records[4]["seed"], records[5]["budget_flops"]
    group = the_group(records)
    assert [run.seed for run in group.results[3:6]] == [3, 0, 3] and np.isnan(group.results[5].budget)
    assert [run.loss for run in group.results] == list(table["loss"])
    del records[2]["loss"], records[3]["params"]
    with pytest.raises(UserError, match=r"^record 3: params is empty"):
        points.read(records)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"objective": "arm", "params": [1e8]}, "the column 'objective' of the table is 'arm'; give a list with a"),
        ({"objective": ["arm"], "params": 1e8}, "the column 'params' of the table is 100000000.0; give a list"),
        ({"objective": ["arm"], "loss": np.array(3.0)}, "the column 'loss' of the table is array(3.); give a list"),
        ({"a": [1], "b": [1, 2]} | {f"c{i}": [1] for i in range(99)}, "but 'a' has 1 values and 'b' has 2"),
        ([{"objective": "arm"}, [1e8, 1e9]], "record 1 is [100000000.0, 1000000000.0]; in a list, each run is"),
        ([], "the table has no row; give each run a mapping"),
        (3.5, "points must be a CSV file, a mapping of columns or a list of mappings, not of type float"),
        (
            {"objective": ["arm"], "params": [[1e8, 2e8]], "tokens": [1e9], "loss": [3.0]},
            "record 0: params=[100000000.0, 200000000.0] must be a plain number",
        ),
        (
            {"objective": ["arm"], "params": [np.arange(99.0)], "tokens": [1e9], "loss": [3.0]},
            "record 0: params=array([ 0.,  1.,  2.,",
        ),
        (
            {"objective": ["arm"], "params": [True], "tokens": [1e9], "loss": [3.0]},
            "record 0: params=True must be a plain number of at least 1",
        ),
    ],
)
def test_a_wrong_table_is_one_short_line(source, words):
    with pytest.raises(UserError) as error:
        points.read(source)
    message = str(error.value)
    assert words in message and "\n" not in message and len(message) < 200, message


def test_optima_are_no_runs():
    table = surface(flag="optimum")
    with pytest.raises(UserError, match=r"all 15 are left out .*these are optima that somebody fitted, and it takes"):
        the_group(table)
    with pytest.raises(UserError, match="a row with this flag is an optimum that was fitted, no run"):
        the_group(table, use=["optimum"])


def test_budgets_of_one_or_two_sizes_are_one_warning_and_no_budgets():
    table = surface(budgets=tuple(np.geomspace(1e18, 1e20, 60)), sizes=1)
    [warning] = the_group(table).warnings
    assert "records 0, 1, 2, 3 and 56 more: 60 budgets have fewer than 3 sizes" in warning
    assert all(np.isnan(run.budget) for run in the_group(table).results)


def test_computed_budgets_that_are_nearly_one_are_to_be_rounded():
    """Three budgets of five sizes are computed as 6 N D from rounded N and D, 0.6% around the nominal one."""
    table = surface()
    table["budget_flops"] = table["budget_flops"] * np.tile(1 + np.linspace(-0.003, 0.003, 5), 3)
    [warning] = the_group(table).warnings
    assert "15 budgets have fewer than 3 sizes" in warning
    assert "; budgets such as 9.97e+17 and 1e+18 seem to be one: give the runs of a budget one value" in warning
    apart = surface(budgets=tuple(np.geomspace(1e18, 1e20, 60)), sizes=1)
    assert "seem to be one" not in the_group(apart).warnings[0]
