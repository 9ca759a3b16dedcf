"""Model arguments: names, clashes, the arguments of generation, and one line for every mistake."""

import pytest

from diffusionlm.errors import UserError
from diffusionlm.evaluation.harness import settings
from diffusionlm.evaluation.harness.options import (
    LIKELIHOOD,
    SAMPLING,
    ModelOptions,
    parse,
    parse_text,
    refuse_foreign,
    sampling_of,
)


def test_fields_go_where_they_belong():
    options = parse({"draws": 4, "guidance": 0.5, "steps": 8, "seed": 3, "dtype": "bfloat16", "batch_size": "8"})
    assert (options.likelihood.draws, options.likelihood.guidance, options.likelihood.seed) == (4, 0.5, 3)
    assert (options.sampling.steps, options.sampling.guidance, options.sampling.seed) == (8, 0.5, 3)
    assert (options.dtype, options.batch_size) == ("bfloat16", 8)
    one = parse({"likelihood.guidance": 2, "sampling.seed": 5})
    assert (one.likelihood.guidance, one.sampling.guidance, one.likelihood.seed, one.sampling.seed) == (2, 0, 0, 5)
    assert parse({}) == ModelOptions()


def test_guidance_and_the_seed_are_all_that_both_have():
    assert LIKELIHOOD & SAMPLING == {"guidance", "seed"}  # the documentation names these


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"drawz": 3}, "unknown model argument 'drawz'; did you mean 'draws'"),
        ({"sampling.draws": 3}, "unknown model argument 'sampling.draws'"),
        ({"draws": 0}, "draws=0 must be an integer of at least 1"),
        ({"draws": "many"}, "draws='many' must be an integer"),
        ({"batch_size": "auto"}, "batch_size=auto must be an integer of at least 1; there is no automatic"),
        ({"greedy": "maybe"}, "greedy='maybe' must be one of auto, always, never"),
        ({"scoring": "best"}, "scoring='best' must be one of likelihood, confidence"),
        ({"sequential": 1}, "sequential=1 must be True or False"),
        ({"devices": 0}, "devices=0 must be an integer of at least 1"),
        ({"sequential": True, "stop_at_stderr": 0.1}, "sequential stops at clear decisions"),
        ({"sequential": True, "scoring": "confidence"}, "sequential needs scoring=likelihood"),
        ({"strategy": "best"}, "unknown strategy 'best'"),
    ],
)
def test_arguments_without_meaning_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)


def test_the_harness_own_defaults_are_taken_and_others_refused():
    refuse_foreign(None, None, "cpu"), refuse_foreign("cuda:0", None, "cpu"), refuse_foreign("cpu", None, "cpu")
    with pytest.raises(UserError, match="device=cuda:1 cannot be chosen here: JAX runs on cpu"):
        refuse_foreign("cuda:1", None, "cpu")
    with pytest.raises(UserError, match="max_batch_size=64 has no use"):
        refuse_foreign(None, 64, "cpu")


def test_a_text_is_read_as_the_harness_reads_it():
    text = "draws=16,guidance=0.5, strategy=random,growing=True,cache=none,eos_penalty=inf"
    values = {"draws": 16, "guidance": 0.5, "strategy": "random", "growing": True, "cache": None}
    assert parse_text(text) == values | {"eos_penalty": float("inf")} and parse_text("") == {}
    for wrong, message in [("draws", "cannot read 'draws'"), ("a=1,a=2", "a comes twice")]:
        with pytest.raises(UserError, match=message):
            parse_text(wrong)


def sampled(gen_kwargs, **arguments):
    return sampling_of(parse(arguments), gen_kwargs)


def test_without_sampling_the_likeliest_tokens_are_taken():
    assert sampled({})[0].temperature == 0 and sampled({})[0].length == 256
    assert sampled({"do_sample": False, "temperature": 0.7})[0].temperature == 0
    assert sampled({"do_sample": True, "temperature": 0.7})[0].temperature == 0.7
    assert sampled({"temperature": 0.7})[0].temperature == 0.7
    assert sampled({}, temperature=0.3)[0].temperature == 0.3  # what the model arguments ask for
    assert sampled({"do_sample": False}, temperature=0.3)[0].temperature == 0  # the task decides


def test_arguments_of_a_task_replace_those_of_the_model():
    sampling, until = sampled({"until": "\n", "max_gen_toks": 32, "steps": 4, "top_p": 0.9}, steps=8, length=64)
    assert (sampling.length, sampling.steps, sampling.top_p, until) == (32, 4, 0.9, ["\n"])
    assert sampled({}, length=64)[0].length == 64 and sampled({"max_new_tokens": 5})[0].length == 5
    for wrong, message in [
        ({"best_of": 3}, "unknown generation argument 'best_of'"),
        ({"until": 3}, "until=3 must be a text"),
        ({"max_gen_toks": 4, "max_new_tokens": 5}, "name two lengths"),
        ({"do_sample": "yes"}, "do_sample='yes' must be True or False"),
        ({"max_gen_toks": 0}, "length=0 must be an integer from 1"),
    ]:
        with pytest.raises(UserError, match=message):
            sampled(wrong)


def test_every_table_of_settings_is_valid_and_says_what_differs():
    assert set(settings.tables()) == {"llada_base", "llada_instruct", "smdm_1028m", "diffugpt", "illada"}
    for name, table in settings.tables().items():
        assert table.differences
        for task in table.tasks:
            chosen, arguments = table.of(name, f"{task}_local")
            sampling_of(parse(arguments), parse_text(chosen.gen_kwargs))
            assert arguments == table.of(name, task)[1]


@pytest.mark.parametrize(
    "name, task, expected",
    [  # reference values of the papers and their released scripts
        ("smdm_1028m", "hellaswag", {"estimator": "iid", "guidance": 0.7, "draws": 16, "passes": 64}),
        ("smdm_1028m", "openbookqa", {"estimator": "chain_rule", "guidance": 1.6}),
        ("llada_base", "arc_challenge", {"estimator": "exact_count", "guidance": 0.5}),
        ("illada", "piqa", {"scoring": "confidence"}),
    ],
)
def test_settings_are_the_published_ones(name, task, expected):
    _, arguments = settings.get(name).of(name, task)
    assert {key: arguments[key] for key in expected} == expected
    passes = {"llada_base": 128, "smdm_1028m": 1024, "diffugpt": 32}.get(name)
    if passes:
        options = parse(parse_text(settings.get(name).model_args))
        assert options.likelihood.draws * options.likelihood.passes == passes


@pytest.mark.parametrize(
    "name, figures",
    [
        ("diffugpt", {"hellaswag": 33.4, "winogrande": 50.8, "social_iqa": 37.0, "piqa": 57.7}),  # of DiffuGPT-S
        ("llada_base", {"gsm8k": 70.3, "minerva_math": 31.4, "humaneval": 35.4, "mbpp": 40.0, "mmlu": 65.9}),
        ("llada_instruct", {"gsm8k": 69.4, "humaneval_instruct": 49.4, "mbpp": 41.0, "arc_challenge_chat": 88.5}),
    ],
)
def test_figures_are_the_published_ones_and_their_source_is_named(name, figures):
    table = settings.get(name)
    assert {task: table.tasks[task].published for task in figures} == figures
    assert "figures: " in table.source or "and figures" in table.source


def test_tables_without_figures_name_no_source_of_figures():
    for table in settings.tables().values():
        published = any(task.published is not None for task in table.tasks.values())
        assert published == ("figures" in table.source), table.title


def test_a_prompt_without_a_dialogue_has_no_figure_of_a_dialogue():
    """`humaneval` stops at the first "def", which would cut the answer of a dialogue; `humaneval_instruct` does not."""
    with pytest.raises(UserError, match="has no task 'humaneval_local'; did you mean 'humaneval_instruct'"):
        settings.get("llada_instruct").of("llada_instruct", "humaneval_local")


def test_unknown_settings_and_tasks_are_one_line():
    with pytest.raises(UserError, match="unknown settings 'llada_bas'; did you mean 'llada_base'"):
        settings.get("llada_bas")
    with pytest.raises(UserError, match="settings=illada has no task 'race'"):
        settings.get("illada").of("illada", "race")
