"""`evaluate CHECKPOINT lm_eval`: the harness' figures with Monte Carlo errors, records, and one line for mistakes."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import assert_one_line
from support.tiny_checkpoint import save
from support.tiny_tasks import HELLASWAG, HUMANEVAL, LAMBADA, MBPP, write

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.evaluation import sandbox
from diffusionlm.evaluation.harness import TASKS
from diffusionlm.evaluation.harness.local_data import LOCAL
from diffusionlm.evaluation.judging import assertion_trial, judge
from diffusionlm.evaluation.sandbox import run as sandbox_run

FEW = "draws=2,rows=16"


lm_eval = pytest.importorskip("lm_eval", reason="needs the package lm_eval (extra eval)")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    directory = tmp_path_factory.mktemp("command")
    return {"mdm": save(directory / "mdm"), "data": write(directory / "data"), "tmp": str(directory)}


def run(places, tasks, **options):
    options = {"model_args": FEW, "data": places["data"], **options}
    return dlm.evaluate(places["mdm"], "lm_eval", tasks=tasks, **options)


def samples_of(directory, task):
    return [json.loads(line) for line in (Path(directory) / f"samples_{task}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(places):
    """One evaluation on all tiny files, with its samples."""
    directory = Path(places["tmp"]) / "samples"
    tasks = "hellaswag_local,winogrande_local,lambada_openai_local"
    return run(places, tasks, samples=str(directory)), directory


def test_figures_are_those_of_the_log_likelihoods(whole):
    result, directory = whole
    hellaswag = samples_of(directory, "hellaswag_local")
    assert [sample["doc"]["query"] for sample in hellaswag] == [doc["query"] for doc in HELLASWAG]
    right, right_norm = [], []
    for sample, doc in zip(hellaswag, HELLASWAG, strict=True):
        scores = [response[0][0] for response in sample["resps"]]
        per_character = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
        right.append(max(range(4), key=lambda i: scores[i]) == doc["gold"])
        right_norm.append(max(range(4), key=lambda i: per_character[i]) == doc["gold"])
        assert len(sample["stderr_of_ll"]) == len(sample["passes"]) == 4 and set(sample["passes"]) == {8}
    metrics = result.metrics
    assert metrics["hellaswag_local/acc"].value == pytest.approx(sum(right) / 6)
    assert metrics["hellaswag_local/acc_norm"].value == pytest.approx(sum(right_norm) / 6)
    assert metrics["hellaswag_local/documents"].value == 6
    p = sum(right) / 6
    assert metrics["hellaswag_local/acc"].stderr == pytest.approx((p * (1 - p) / 5) ** 0.5)  # over documents
    assert {"hellaswag_local/mc_stderr_of_acc", "hellaswag_local/undecided"} <= set(metrics)
    assert metrics["winogrande_local/acc"].value in (0, 1)  # twice the same document
    words = samples_of(directory, "lambada_openai_local")
    assert [sample["target"] for sample in words] == [f" {doc['continuation']}" for doc in LAMBADA]
    assert all(isinstance(sample["acc"], int) for sample in words)
    assert metrics["lambada_openai_local/mc_stderr_of_perplexity"].value > 0


def test_the_config_says_what_was_evaluated(whole):
    config = whole[0].config
    assert config["lm_eval"] == lm_eval.__version__ and config["fewshot_random_seed"] == 1234
    first = config["runs"][0]
    assert first["tasks"] == ["hellaswag_local"] and first["model_args"]["likelihood"]["draws"] == 2
    assert first["documents"]["hellaswag_local"]["effective"] == 6 and first["truncated"] == 0
    assert sum(run["forwards"] for run in config["runs"]) == whole[0].forwards >= (6 * 4 + 2 * 2 + 3) * 8 * 2


def test_our_own_task_gives_the_same_errors_in_the_harness_itself(whole, places):
    """The metrics of the task's YAML file, as `lm_eval` alone shows them, and those that the command computes."""
    from lm_eval.tasks import TaskManager

    from diffusionlm.evaluation.harness.model import DiffusionLM

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": places["data"]})
    model = DiffusionLM(places["mdm"], draws=2, rows=16)
    results = lm_eval.simple_evaluate(model, tasks=["hellaswag_local"], task_manager=manager, bootstrap_iters=0)
    assert results is not None
    for name in ("acc", "acc_norm", "mc_stderr_of_acc", "mc_stderr_of_acc_norm", "undecided", "stderr_of_ll"):
        value = results["results"]["hellaswag_local"][f"{name},none"]
        assert value == pytest.approx(whole[0].metrics[f"hellaswag_local/{name}"].value, rel=1e-4)
    noise = results["config"]["monte_carlo"]["hellaswag_local"]
    assert noise["undecided"] <= results["results"]["hellaswag_local"]["undecided,none"]  # there of both accuracies
    bound = 1.001 * noise["mc_stderr_of_acc_at_most"]  # its integral is taken in another way
    assert bound >= results["results"]["hellaswag_local"]["mc_stderr_of_acc,none"] > 0
    assert len(results["config"]["params_sha256"]) == 64


def test_a_limit_changes_no_document(whole, places, tmp_path):
    run(places, "hellaswag_local", limit=2, samples=str(tmp_path))
    some, all_ = samples_of(tmp_path, "hellaswag_local"), samples_of(whole[1], "hellaswag_local")
    assert len(some) == 2
    for sample, other in zip(some, all_, strict=False):
        for a, b in zip(sample["resps"], other["resps"], strict=True):
            assert a[0][0] == pytest.approx(b[0][0], rel=1e-5)


def test_an_evaluation_is_taken_up_again(places, tmp_path, monkeypatch):
    from diffusionlm.evaluation.harness import scoring

    output = tmp_path / "result.json"
    first = run(places, "hellaswag_local", output=output, limit=3)
    saved = json.loads(output.read_text())
    assert saved["metrics"]["hellaswag_local/acc"]["value"] == first.metrics["hellaswag_local/acc"].value
    assert saved["forwards"] == 3 * 4 * 8 * 2 and len(saved["params_sha256"]) == 64 and saved["seconds"] > 0
    scored = []

    def remembers(*args, **kwargs):
        scored.append(len(args[2]))
        return estimate(*args, **kwargs)

    estimate = scoring.estimate
    monkeypatch.setattr(scoring, "estimate", remembers)
    again = run(places, "hellaswag_local", output=output, limit=3, resume=True)
    assert scored == [] and again.metrics == first.metrics
    run(places, "hellaswag_local", output=output, limit=4, resume=True)
    assert scored == [4]  # the document that was missing


def test_an_evaluation_is_taken_up_with_other_tasks(places, tmp_path):
    output = tmp_path / "result.json"
    run(places, "hellaswag_local", output=output, limit=2)
    more = run(places, "boolq_local,hellaswag_local", output=output, limit=2, resume=True)
    alone = run(places, "hellaswag_local", limit=2)
    assert {name: more.metrics[name] for name in alone.metrics} == alone.metrics
    records = [json.loads(line) for line in output.with_name("result.items.jsonl").read_text().splitlines()]
    assert len(records) == 1 + 2 * 4 + 2 * 2  # a header, four endings of two stories, two answers to two questions


def test_settings_of_a_table_are_used_and_named(places):
    result = run(places, "boolq_local", settings="smdm_1028m", model_args="rows=16", limit=2)
    likelihood = result.config["runs"][0]["model_args"]["likelihood"]
    assert (likelihood["estimator"], likelihood["guidance"], likelihood["rows"]) == ("chain_rule", 1.6, 16)
    assert result.metrics["boolq_local/mc_stderr_of_acc"].value == 0  # exact
    assert result.config["differences"]


def test_generation_takes_shots_and_both_rules_of_extraction(places):
    options = {"gen_kwargs": "max_gen_toks=8,steps=2", "num_fewshot": 1, "limit": 1, "batch_size": 1}
    result = run(places, "gsm8k_local", **options)
    assert {"gsm8k_local/exact_match,strict-match", "gsm8k_local/exact_match,flexible-extract"} <= set(result.metrics)
    assert result.config["runs"][0]["num_fewshot"] == {"gsm8k_local": 1} and result.forwards == 2


def written(monkeypatch, write):
    """Let the model answer with what `write` gives for a document; returns the contexts that it was given."""
    from diffusionlm.evaluation.harness.model import DiffusionLM

    contexts = []

    def generate_until(self, requests, disable_tqdm=False):
        contexts.extend(request.args[0] for request in requests)
        return [write(request.doc) for request in requests]

    monkeypatch.setattr(DiffusionLM, "generate_until", generate_until)
    return contexts


def test_programs_of_human_eval_pass_if_their_tests_do(places, tmp_path, monkeypatch):
    """The first solution is right, the second parses and is wrong, the third does not parse."""
    solutions = dict(zip(("T/0", "T/1", "T/2"), ("    return a\n", "    return a\n", "    return (\n"), strict=True))
    contexts = written(monkeypatch, lambda doc: solutions[doc["task_id"]])
    options = {"allow_code_execution": True, "samples": str(tmp_path), "settings": "llada_base"}
    result = run(places, "humaneval_local", **options)
    assert contexts == [doc["prompt"] for doc in HUMANEVAL]
    assert result.metrics["humaneval_local/pass_at_1"].value == pytest.approx(1 / 3)
    assert result.metrics["humaneval_local/out_of_time"].value == 0
    assert [sample["pass_at_1"] for sample in samples_of(tmp_path, "humaneval_local")] == [1, 0, 0]
    (first,) = result.config["runs"]
    assert first["published"]["percent"] == 35.4 and first["sandbox"] in result.notes


def test_programs_of_mbpp_pass_if_their_tests_do(places, tmp_path, monkeypatch):
    """The examples are the three before the test set, and a block of Markdown is the program that it holds."""
    answers = {11: "def plus(a):\n    return a + 11\n", 510: "```python\ndef plus(a):\n    return a + 1\n```"}
    contexts = written(monkeypatch, lambda doc: answers[doc["task_id"]])
    result = run(places, "mbpp_local", allow_code_execution=True, samples=str(tmp_path))
    assert [sample["pass_at_1"] for sample in samples_of(tmp_path, "mbpp_local")] == [1, 0]
    assert result.metrics["mbpp_local/pass_at_1"].value == 0.5
    shots = [MBPP[i] for i in (1, 2, 3)]
    start = "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
    prompt = "".join(
        start.format(**shot) + "\n".join(shot["test_list"]) + f"\n[BEGIN]\n{shot['code']}\n[DONE]\n\n" for shot in shots
    )
    assert contexts[0] == prompt + start.format(**MBPP[6]) + "\n".join(MBPP[6]["test_list"]) + "\n[BEGIN]\n"


def test_the_examples_of_mbpp_pass_their_own_tests():
    """The harness brings three records of the real file, with the solutions of its authors."""
    path = Path(lm_eval.__file__).parent / "tasks/mbpp/utils.py"
    tree = ast.parse(path.read_text())
    functions = [node for node in tree.body if getattr(node, "name", "") == "list_fewshot_samples"]
    namespace = {}
    exec(compile(ast.Module(functions, []), str(path), "exec"), namespace)
    place = sandbox.find(allow_code_execution=True)
    for record in namespace["list_fewshot_samples"]():
        doc = LOCAL["mbpp"].read(record | {"test_setup_code": ""}, "here")
        trial = assertion_trial(doc["code"], doc["test_setup_code"], doc["test_list"])
        assert judge(place, trial, doc["code"])["pass_at_1"]
        assert not judge(place, trial, doc["code"].replace("return", "return not"))["pass_at_1"]


@pytest.mark.parametrize("task", ["humaneval_local", "mbpp_local"])
def test_programs_are_refused_before_they_are_written_where_no_sandbox_works(task, places, monkeypatch, capsys):
    monkeypatch.setattr(sandbox_run, "why_not", lambda place: "no")
    contexts = written(monkeypatch, lambda doc: "")
    args = ["evaluate", places["mdm"], "lm_eval", "--data", places["data"], "--tasks"]
    assert cli.main([*args, f"piqa_local,{task}"]) == 2 and contexts == []
    captured = capsys.readouterr()
    assert_one_line(captured, ["runs only in a sandbox", "--allow_code_execution"])
    monkeypatch.setattr("diffusionlm.evaluation.harness.plugin.judge", lambda place, trial, solution: FINE)
    result = run(places, task, allow_code_execution=True)
    assert result.metrics[f"{task}/pass_at_1"].value == 1 and "programs ran WITHOUT a sandbox" in result.notes


FINE = {"pass_at_1": True, "ending": "exit", "error": ""}


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--tasks helaswag_local", ["unknown task 'helaswag_local'", "did you mean 'hellaswag_local'"]),
        ("--tasks race_local", ["race_local finds no file in {data}", "eval/race/test_high.jsonl"]),
        ("--tasks ,", ["tasks=',' names no task"]),
        ("--tasks piqa_local --model_args drawz=2", ["unknown model argument 'drawz'"]),
        ("--tasks piqa_local --model_args estimator=chain", ["unknown estimator 'chain'"]),
        ("--tasks piqa_local --settings llama", ["unknown settings 'llama'"]),
        ("--tasks piqa_local --settings illada_", ["did you mean 'illada'"]),
        ("--tasks race_local --settings diffugpt", ["settings=diffugpt has no task 'race_local'"]),
        ("--tasks piqa_local --limit 1.5", ["limit=1.5 must be an integer of at least 1, a share"]),
        ("--tasks piqa_local --apply_chat_template", ["needs a chat template, and this model has none"]),
        ("--tasks piqa_local --fewshot_as_multiturn", ["it needs apply_chat_template"]),
        ("--tasks piqa_local --include_path {tmp}/none", ["include_path={tmp}/none is no directory"]),
        ("--tasks gsm8k_local --num_fewshot 1 --gen_kwargs max_gen_toks=200", ["max_gen_toks=200 leaves no room"]),
        ("--tasks gsm8k_local --num_fewshot 1 --gen_kwargs best_of=2", ["unknown generation argument 'best_of'"]),
        ("--tasks piqa_local --batch_size 0", ["batch_size=0"]),
        ("--data {tmp}", ["missing --tasks"]),
    ],
)
def test_mistakes_are_one_line(words, parts, places, capsys):
    args = ["evaluate", places["mdm"], "lm_eval"]
    data = [] if "--data" in words else ["--data", places["data"]]
    assert cli.main([*args, *data, *(word.format(**places) for word in words.split())]) == 2
    captured = capsys.readouterr()
    last = type(captured)("", captured.err.splitlines(keepends=True)[-1])  # behind bars of progress of the harness
    assert_one_line(last, [part.format(**places) for part in parts])


@pytest.mark.slow
def test_the_harness_own_command_takes_our_task_files(places, tmp_path):
    """Run the command of 0.4.13, in which the task file registers the model by what it imports."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "diffusionlm", "--limit", "2"]
    command += ["--model_args", f"pretrained={places['mdm']},{FEW}", "--tasks", f"{TASKS}/hellaswag_local.yaml"]
    command += ["--metadata", f"data={places['data']}", "--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "mc_stderr_of_acc" in done.stdout, done.stdout + done.stderr
    (results,) = tmp_path.glob("**/results_*.json")
    assert "undecided,none" in json.loads(results.read_text())["results"]["hellaswag_local"]
