"""The command: every wrong input is one line and exit code 2; the verbs; and what importing the package loads."""

import errno
import gzip
import json
import logging
import re
import shutil
import subprocess
import sys

import pytest
from support.command_line import LENGTH, TINY, assert_one_line, options
from support.invalid_configs import INVALID

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.options import fields
from diffusionlm.training import loop as trainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    (directory / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    args = ["--output", str(directory / "made"), "--tokenizer", "byte", "--sequence_length", str(LENGTH)]
    assert cli.main(["data", "prepare", str(directory / "text.txt"), *args]) == 0
    return directory / "made"


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A finished run directory."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    args = ["--workdir", str(workdir), "--data.path", str(dataset), *options(TINY)]
    assert cli.main(["train", "demo", *args]) == 0
    return workdir


@pytest.fixture
def places(tmp_path, dataset, run):
    """Paths for the table of wrong inputs, by the name that stands for them there."""
    (tmp_path / "file").write_text("a file, not a directory")
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": "cut off\n')
    (tmp_path / "binary.txt").write_bytes(b"text \xff\xfe no text")
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a long enough text"}\n' * 99)[:-20])
    shutil.copytree(dataset, tmp_path / "changed")
    meta = json.loads((dataset / "meta.json").read_text())
    (tmp_path / "changed" / "meta.json").write_text(json.dumps(meta | {"vocab_size": 300}))
    return {"dataset": dataset, "tmp": tmp_path, "run": run}


def words(command, places):
    return [word.format(**places) for word in command.split()]


WRONG = [
    ("trian demo", ["'trian'", "'train'"]),
    ("data prepar x", ["'data prepar'", "'data prepare'"]),
    ("--verison", ["'--verison'"]),
    ("train", ["EXPERIMENT", "demo"]),
    ("train --workdir x demo", ["EXPERIMENT", "first"]),
    ("train demoo", ["'demoo'", "'demo'"]),
    ("train demo --model.d_modle 3", ["'model.d_modle'", "'model.d_model'"]),
    ("train demo --model.d-modle=3", ["'model.d_modle'", "'model.d_model'"]),
    ("train demo --batch_size 3", ["'batch_size'", "'data.batch_size'"]),
    ("train demo --qqqq 3", ["'qqqq'", "--help"]),
    ("train demo -d 3", ["'d'"]),
    ("train demo 3", ["'3'", "--help"]),
    ("train demo --workdir", ["workdir", "value"]),
    ("train demo --run.steps", ["run.steps", "an integer"]),
    ("train demo --run.steps --run.seed 3", ["run.steps", "an integer"]),
    ("train demo --run.steps many", ["run.steps=many", "an integer"]),
    ("train demo --run.steps 3.5", ["run.steps=3.5", "an integer"]),
    ("train demo --run.seed 1 --run.steps 3 4", ["'4'"]),
    ("train demo --optim.peak_lr=high", ["optim.peak_lr=high", "a number"]),
    ("train demo --model.causal yes", ["model.causal=yes", "True or False"]),
    ("train demo --model.norm batchnorm", ["model.norm=batchnorm", "rmsnorm, layernorm"]),
    ("train demo --diffusion.mask_id x", ["diffusion.mask_id=x", "an integer or None"]),
    (
        "train demo --diffusion.schedule lineer --workdir {tmp}/w --data.path {dataset} --model.vocab_size 257 "
        "--data.sequence_length 16",
        ["'lineer'", "'linear'"],
    ),
    ("train demo --workdir {tmp}/file/run", ["{tmp}/file/run", "Not a directory"]),
    ("train demo --workdir {tmp}/w --data.path {tmp}/none", ["{tmp}/none", "does not exist"]),
    ("train demo --workdir {tmp}/w --data.path {tmp}", ["{tmp}", "meta.json"]),
    ("train demo --workdir {tmp}/w --data.path {tmp}/changed", ["{tmp}/changed", "changed"]),
    ("train demo --workdir {tmp}/w --data.path {dataset} --model.vocab_size 99", ["257", "99"]),
    (
        "train demo --workdir {tmp}/w --data.path {dataset} --model.vocab_size 257 --data.sequence_length 20",
        ["16", "20", "--data.sequence_length"],
    ),
    ("train tinystories --workdir {tmp}/w", ["tinystories", "--data.path"]),
    ("sample", ["CHECKPOINT", "--help"]),
    ("sample {tmp}/none", ["{tmp}/none", "does not exist"]),
    ("sample {tmp}/file", ["{tmp}/file", "is a file"]),
    ("sample {tmp}", ["{tmp}", "no diffusionlm checkpoint"]),
    ("sample x y", ["'y'", "--help"]),
    ("sample x --jsn", ["'jsn'", "'json'"]),
    ("sample x --json True", ["'True'"]),
    ("sample x --strategy low_confidenc", ["'low_confidenc'", "'low_confidence'"]),
    ("sample x --length -4", ["length=-4", "from 1"]),
    ("sample x --temperature -1", ["temperature=-1.0", "from 0"]),
    ("sample x --steps few", ["steps=few", "an integer or None"]),
    ("sample x --count 0", ["count=0", "at least 1"]),
    ("sample x --prompt a --prompt_file b", ["'a'", "'b'", "exclude"]),
    ("sample x --prompt_file {tmp}/none", ["{tmp}/none"]),
    ("sample x --prompt_file {tmp}/binary.txt", ["{tmp}/binary.txt", "utf-8"]),
    ("sample x --infill a --prompt b", ["infill='a'", "without prompt", "drop"]),
    ("sample x --infill a --prompt_file b", ["infill='a'", "prompt_file", "drop"]),
    ("sample x --json --trace", ["json", "trace", "drop one"]),
    ("sample x --raw --infill a", ["raw", "infill", "drop one"]),
    ("sample x --html {tmp}/none/trace.html", ["{tmp}/none/trace.html", "does not exist"]),
    ("sample x --html {tmp}", ["{tmp}", "not a file"]),
    ("sample {run} --infill none", ["'none' has no gap", "{{mask:8}}"]),
    ("sample {run} --infill a{{mask:0}}b", ["'{{mask:0}}' is not a gap", "{{mask:N}}", "from 1 to"]),
    ("sample {run} --infill a{{mask:abc}}b", ["'{{mask:abc}}' is not a gap", "{{mask:N}}", "from 1 to"]),
    ("data prepare --output {tmp}/o --sequence_length 8", ["SOURCE"]),
    ("data prepare {tmp}/file", ["--output"]),
    (
        "export {tmp}/x --format llama --output {tmp}/o --dtype bf16",
        ["dtype=bf16", "float32, bfloat16, float16 or None"],
    ),
    (
        "data prepare python_dcs --output {tmp}/o --sequence_length 8 --tokenizer byte",
        ["'python_dcs'", "'python_docs'"],
    ),
    (
        "data prepare {tmp}/broken.jsonl --output {tmp}/o --sequence_length 8 --tokenizer byte --no_progress",
        ["{tmp}/broken.jsonl:2", "on_error=skip"],
    ),
    (
        "data prepare {tmp}/binary.txt {tmp}/broken.jsonl --output {tmp}/o --sequence_length 8 --tokenizer byte "
        "--no_progress",
        ["{tmp}/binary.txt", "UTF-8"],
    ),
    (
        "data prepare {tmp}/short.jsonl.gz --output {tmp}/o --sequence_length 8 --tokenizer byte --no_progress",
        ["{tmp}/short.jsonl.gz", "gzip"],
    ),
    ("data prepare {tmp}/broken.jsonl --output {tmp}/o --sequence_length 0 --tokenizer byte", ["sequence_length=0"]),
    (
        "data prepare {tmp}/broken.jsonl --output {tmp}/o --sequence_length 8 --tokenizer byte --format chat",
        ["format=chat", "text, sft"],
    ),
    (
        "data prepare {tmp}/broken.jsonl --output {tmp}/o --sequence_length 8 --tokenizer byte --format sft "
        "--no_progress",
        ["{tmp}/broken.jsonl:1", "'text' are of no known shape", "prompt+response", "on_error=skip"],
    ),
    (
        "data prepare {tmp}/broken.jsonl --output {tmp}/o --sequence_length 8 --tokenizer {tmp}",
        ["{tmp}", "no diffusionlm checkpoint"],
    ),
    ("train tinystories_sft --workdir {tmp}/w --run.init_from {tmp}/none", ["run.init_from", "{tmp}/none"]),
    ("data inspect {tmp}/none", ["{tmp}/none", "does not exist"]),
    ("data inspect {dataset} --split tset", ["'tset'", "train, validation"]),
    ("data inspect {dataset} --count -1", ["count=-1"]),
    ("experiments demoo", ["'demoo'", "'demo'"]),
    ("experiments demo demo_arm", ["'demo_arm'"]),
]


@pytest.mark.parametrize("command, parts", WRONG, ids=[command for command, _ in WRONG])
def test_a_mistake_is_one_line_and_exit_code_2(command, parts, places, capsys):
    args = words(command, places)
    capsys.readouterr()
    code = cli.main(args)
    assert_one_line(capsys.readouterr(), [part.format(**places) for part in parts])
    assert code == 2


@pytest.mark.parametrize("overrides, parts", INVALID)
def test_a_value_out_of_range_is_one_line_and_exit_code_2(overrides, parts, tmp_path, capsys):
    code = cli.main(["train", "demo", "--workdir", str(tmp_path / "run"), *options(overrides)])
    assert_one_line(capsys.readouterr(), parts)
    assert code == 2
    assert not (tmp_path / "run").exists()


def test_a_truncated_checkpoint_is_one_line_and_exit_code_2(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    params = [file for file in (tmp_path / "copy" / "checkpoints" / "2" / "params").rglob("*") if file.is_file()]
    for file in params:
        file.write_bytes(file.read_bytes()[:10])
    capsys.readouterr()
    assert cli.main(["sample", str(tmp_path / "copy"), "--length", "4"]) == 2
    assert_one_line(capsys.readouterr(), [str(tmp_path / "copy" / "checkpoints" / "2"), "damaged"])


def test_another_run_in_the_directory_is_refused_with_the_fields_that_differ(run, dataset, capsys):
    args = ["--workdir", str(run), "--data.path", str(dataset), *options(TINY | {"optim.beta1": 0.8, "run.seed": 5})]
    capsys.readouterr()
    assert cli.main(["train", "demo", *args]) == 2
    captured = capsys.readouterr()
    assert all(part in captured.err for part in (str(run), "optim.beta1", "0.9", "0.8", "run.seed"))
    assert "run.steps" not in captured.err


@pytest.mark.parametrize(
    "command, parts",
    [
        ("train demo --model.d_modle 3", ["'model.d_modle'", "'model.d_model'"]),
        ("train demo --workdir {tmp}/w --data.path {dataset} --model.vocab_size 99", ["257", "99"]),
    ],
)
def test_a_mistake_in_a_real_process(command, parts, places):
    script = [sys.executable, "-m", "diffusionlm"]
    done = subprocess.run([*script, *words(command, places)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("diffusionlm: error: ")
    assert all(part in done.stderr for part in parts)


def raising(error):
    def verb(args, prog):
        raise error

    return verb


@pytest.mark.parametrize(
    "error, code, part",
    [
        (UserError("one\ntwo"), 2, "one two"),
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere"), 2, "No space left on device: /somewhere"),
        (PermissionError(errno.EACCES, "Permission denied", "/somewhere"), 2, "Permission denied: /somewhere"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_verb_raises_becomes_one_line(error, code, part, monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "train", raising(error))
    assert cli.main(["train"]) == code
    assert_one_line(capsys.readouterr(), [part])


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "a bug"), ValueError("a bug")]
)
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "train", raising(error))
    with pytest.raises(type(error), match="a bug"):
        cli.main(["train"])


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(monkeypatch, tmp_path, capsys):
    def train(cfg, workdir):
        raise trainer.DivergenceError("step 7 gave loss nan")

    monkeypatch.setattr(trainer, "train", train)
    assert cli.main(["train", "demo", "--workdir", str(tmp_path)]) == 1
    assert_one_line(capsys.readouterr(), ["step 7", "nan"])


def test_a_stopped_run_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer, "train", lambda cfg, workdir: trainer.Run(workdir, cfg, 7, None))
    assert cli.main(["train", "demo", "--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"step 7 of {dlm.experiment('demo').run.steps}" in out and str(tmp_path) in out


def test_the_fields_reach_the_trainer(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(
        trainer, "train", lambda cfg, workdir: given.append((cfg, workdir)) or trainer.Run(workdir, cfg, 0, None)
    )
    overrides = {"model.causal": True, "objective": "arm", "diffusion.mask_id": 5, "mesh.fsdp": -1, "data.path": "-a=b"}
    args = [f"--{name}={value}" for name, value in overrides.items()]
    assert cli.main(["train", "demo", *args, "--optim.peak-lr", "-1e-3", "--name", "other"]) == 0
    cfg, workdir = given[0]
    assert cfg == dlm.experiment("demo", overrides | {"optim.peak_lr": -1e-3, "name": "other"})
    assert (cfg.model.causal, cfg.objective, cfg.diffusion.mask_id, cfg.data.path) == (True, "arm", 5, "-a=b")
    assert cfg.optim.peak_lr == -1e-3
    assert workdir == "runs/other"


def test_train_writes_a_run_and_a_second_call_says_that_it_is_done(run, dataset, capsys):
    result = json.loads((run / "DONE.json").read_text())
    assert (result["step"], result["tokens"]) == (2, 2 * 8 * LENGTH)
    capsys.readouterr()
    assert cli.main(["train", "demo", "--workdir", str(run), "--data.path", str(dataset), *options(TINY)]) == 0
    out = capsys.readouterr().out
    assert "done before" in out and str(run) in out
    assert f"{result['eval']['bits_per_byte']:.3f} bits per byte" in out


def test_train_goes_on_with_a_run_that_was_stopped(run, dataset, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "DONE.json").unlink()
    args = ["--workdir", str(tmp_path / "copy"), "--data.path", str(dataset), *options(TINY)]
    capsys.readouterr()
    assert cli.main(["train", "demo", *args]) == 0
    assert f"going on from step 2 in {tmp_path / 'copy'}" in capsys.readouterr().err
    before, after = (json.loads((w / "DONE.json").read_text())["eval"] for w in (run, tmp_path / "copy"))
    assert before == after


def test_sample_fills_gaps(run, capsys):
    capsys.readouterr()
    args = ["sample", str(run), "--infill", "once{mask:3}time", "--count", "2", "--temperature", "0.3"]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert cli.main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(one) for one in found["completions"]] == [{"prompt", "text", "tokens", "nfe", "seconds"}] * 2
    for one in found["completions"]:
        assert one["prompt"] == "once{mask:3}time" and len(one["tokens"]) == 1 + 4 + 3 + 4
        assert one["text"].startswith("once") and one["text"].endswith("time")
    assert (found["config"]["length"], found["config"]["steps"], found["config"]["temperature"]) == (3, 3, 0.3)
    assert out == "".join(f"--- {i} of 2\n{one['text']}\n" for i, one in enumerate(found["completions"], start=1))


def test_a_space_in_a_gap_is_one_line_and_exit_code_2(run, capsys):
    capsys.readouterr()
    assert cli.main(["sample", str(run), "--infill", "a {mask: 8} b"]) == 2
    assert_one_line(capsys.readouterr(), ["'{mask: 8}' is not a gap", "write {mask:N} without spaces"])


@pytest.mark.parametrize("what", [["--prompt", "line", "--length", "4"], ["--infill", "line{mask:4} of"]])
def test_sample_writes_a_page_and_prints_the_same(run, what, tmp_path, capsys):
    args = ["sample", str(run), *what, "--count", "2", "--json"]
    capsys.readouterr()
    found = []
    for more in ([], ["--html", str(tmp_path / "trace.html")]):
        assert cli.main([*args, *more]) == 0
        found.append([one["text"] for one in json.loads(capsys.readouterr().out)["completions"]])
    assert found[0] == found[1]
    page = (tmp_path / "trace.html").read_text()
    assert page.count("<section") == 2 and page.endswith("</html>\n")


def test_sample_shows_the_trace(run, capsys):
    for what in (["--prompt", "line", "--length", "4"], ["--infill", "line{mask:4} of"]):
        capsys.readouterr()
        assert cli.main(["sample", str(run), *what, "--trace"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("step 0/4\nline" + "░" * 4) and "step 4/4\nline" in out
        assert "{mask" not in out


def test_a_page_that_cannot_be_written_is_told_before_any_work(monkeypatch, tmp_path, capsys):
    from diffusionlm.pretrained import model as load

    monkeypatch.setattr(load, "load", lambda path: pytest.fail("loaded"))
    assert cli.main(["sample", "x", "--html", str(tmp_path / "none" / "trace.html")]) == 2
    assert_one_line(capsys.readouterr(), ["does not exist"])


def test_sample_json_has_the_agreed_keys(run, tmp_path, capsys):
    (tmp_path / "prompt").write_text("line 1\n")
    capsys.readouterr()
    args = ["--prompt_file", str(tmp_path / "prompt"), "--length", "4", "--count", "2", "--seed", "3", "--json"]
    assert cli.main(["sample", str(run), *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"completions", "config"}
    assert [set(one) for one in found["completions"]] == [{"prompt", "text", "tokens", "nfe", "seconds"}] * 2
    assert [one["prompt"] for one in found["completions"]] == ["line 1"] * 2
    assert found["config"]["length"] == len(found["completions"][0]["tokens"]) == 4
    assert found["config"]["seed"] == 3


def test_sample_says_how_far_a_cache_is_off(run, capsys):
    """A cache that is always refreshed is not; one that never is gives the share of equal tokens."""
    plain = ["--prompt", "line 1", "--length", "8", "--block_length", "8", "--count", "2", "--json"]
    args = [*plain, "--cache", "dual", "--agreement"]
    capsys.readouterr()
    assert cli.main(["sample", str(run), *args, "--refresh", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"] == 1.0
    assert cli.main(["sample", str(run), *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["sample", str(run), *plain]) == 0
    exact = json.loads(capsys.readouterr().out)
    some, others = ([t for one in answer["completions"] for t in one["tokens"]] for answer in (found, exact))
    assert found["agreement"] == sum(a == b for a, b in zip(some, others, strict=True)) / 16 and found["times"] > 0
    assert cli.main(["sample", str(run), "--infill", "a {mask:2}", "--agreement"]) == 2
    assert "agreement" in capsys.readouterr().err


def test_sample_prints_the_prompt_and_its_completion(run, capsys):
    args = ["--prompt", "line 1", "--length", "4", "--count", "2"]
    capsys.readouterr()
    assert cli.main(["sample", str(run), *args, "--json"]) == 0
    texts = [one["text"] for one in json.loads(capsys.readouterr().out)["completions"]]
    assert cli.main(["sample", str(run), *args]) == 0
    assert capsys.readouterr().out == f"--- 1 of 2\nline 1{texts[0]}\n--- 2 of 2\nline 1{texts[1]}\n"


def test_from_instructions_to_an_answer(run, tmp_path, capsys):
    """Prepared with the tokenizer of a model, which is then fine-tuned and asked."""
    found = [{"question": f"{i}?", "answer": f"{i}!"} for i in range(200)]
    (tmp_path / "asked.json").write_text(json.dumps(found))
    made, tuned = str(tmp_path / "made"), str(tmp_path / "tuned")
    args = ["--format", "sft", "--template", "none", "--tokenizer", str(run), "--sequence_length", str(LENGTH)]
    assert cli.main(["data", "prepare", str(tmp_path / "asked.json"), "--output", made, *args]) == 0
    out, err = capsys.readouterr()
    assert not out and "answers" in err
    assert cli.main(["data", "inspect", made, "--count", "1"]) == 0
    out = capsys.readouterr().out
    assert "answers" in out and "0?0!" in out
    args = {**TINY, "data.path": made, "run.init_from": run, "data.packing": "examples", "diffusion.random_length": 0.0}
    assert cli.main(["train", "demo", "--workdir", tuned, *options(args)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    for more in ([], ["--raw"]):  # template=none: nothing is around the prompt either way
        assert cli.main(["sample", tuned, "--prompt", "7?", "--length", "4", "--json", *more]) == 0
        text = json.loads(capsys.readouterr().out)["completions"][0]["text"]
        assert cli.main(["sample", tuned, "--prompt", "7?", "--length", "4", *more]) == 0
        assert capsys.readouterr().out == f"7?{text}\n"


def test_data_inspect_shows_the_text(dataset, capsys):
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(dataset), "--count", "1"]) == 0
    assert "line 0 of a text" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(dataset), "--count", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["records"][0]["documents"] == ["line 0 of a text\n"]  # a record is LENGTH + 1 bytes


def test_experiments_lists_all_with_their_docstrings(capsys):
    assert cli.main(["experiments", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["experiments"]
    assert [one["name"] for one in listed] == dlm.experiment_names()
    assert cli.main(["experiments"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for one, line in zip(listed, lines, strict=True):
        assert line.split()[:2] == [one["name"], one["objective"]]
        assert one["description"] and line.endswith(one["description"])


def test_experiments_shows_one_with_its_counts(capsys):
    assert cli.main(["experiments", "smdm_170m", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    non_embedding = 18 * (4 * 768**2 + 3 * 768 * 3072 + 2 * 768) + 768
    assert found["parameters"]["non_embedding"] == non_embedding
    assert found["flops"]["6nd"] == 6 * non_embedding * found["tokens"]
    assert found["config"]["run"]["steps"] * found["config"]["data"]["batch_size"] * 2048 == found["tokens"]
    assert cli.main(["experiments", "smdm_170m"]) == 0
    text = capsys.readouterr().out
    assert f"{non_embedding:,} non-embedding" in text
    assert all(re.search(rf"^  {re.escape(name)} +\S", text, re.MULTILINE) for name in fields(Config))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffusionlm {dlm.__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_the_verbs(args, capsys):
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{verb} +\S.*\.$", out, re.MULTILINE) for verb in cli.VERBS)


def test_help_of_a_family_lists_its_verbs(capsys):
    assert cli.main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data prepare" in out and "data inspect" in out and "experiments" not in out


@pytest.mark.parametrize("command", ["train demo", "sample", "data prepare", "data inspect", "experiments"])
def test_help_explains_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert cli.main([*command.split(), "--help"]) == 0
    captured = capsys.readouterr()
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", captured.out).split())
    names = re.findall(r"--([a-z]\w*(?:\.\w+)?) (?!, )", text)
    if command == "train demo":
        assert set(fields(Config)) <= set(names)
    for name in set(names) - {"help"}:
        described = re.search(rf"--{name} (?:\S+ )?(?P<help>.*?)(?P<end>\(default: |\(required\))", text)
        assert len(described["help"]) > 3, f"{name} has no help"
    assert captured.err == ""


def test_help_shows_the_defaults_of_the_experiment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert cli.main(["train", "demo_arm", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--model\.causal \{True,False\}[^-]*\(default: True\)", out)
    assert re.search(rf"--model\.d_model INT[^-]*\(default: {dlm.experiment('demo_arm').model.d_model}\)", out)


def test_warnings_are_shown_and_noise_is_not(capsys):
    handler = cli.StderrHandler()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        logging.getLogger("diffusionlm.parallel.mesh").warning("axis %s\ndropped", "fsdp")
        logging.getLogger("jax._src.xla_bridge").warning("falling back to cpu")
        logging.getLogger("orbax.thing").warning("noise")
        logging.getLogger("orbax.thing").error("broken")
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().err == (
        "diffusionlm: warning: axis fsdp dropped\n"
        "diffusionlm: warning: falling back to cpu\n"
        "diffusionlm: error: broken\n"
    )


def test_importing_loads_no_jax_and_no_backend():
    script = """
import sys
import diffusionlm
import diffusionlm.config, diffusionlm.registry, diffusionlm.presets, diffusionlm.flops
diffusionlm.UserError, diffusionlm.Config, diffusionlm.SamplingConfig, diffusionlm.presets, diffusionlm.flops
assert diffusionlm.experiment("demo", {"run.steps": 7}).run.steps == 7
from diffusionlm.cli import main
main(["experiments"]), main(["train", "demo", "--help"]), main(["sample", "--help"])
heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow_datasets", "grain", "numpy", "sentencepiece"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_every_public_name_is_there():
    for name in dlm.__all__:
        assert getattr(dlm, name) is not None
        assert name in dir(dlm)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        dlm.tarin  # noqa: B018


def test_a_notebook_overrides_fields_as_the_command_line_does():
    cfg = dlm.experiment("demo", {"run.steps": 100, "optim.peak_lr": 1, "diffusion.mask_id": None, "data.path": "a b"})
    assert (cfg.run.steps, cfg.optim.peak_lr, cfg.diffusion.mask_id, cfg.data.path) == (100, 1.0, None, "a b")
    assert isinstance(cfg.optim.peak_lr, float)
    assert dlm.experiment("demo") == dlm.experiment("demo", {})
    with pytest.raises(UserError, match="unknown option 'run.stepz'; did you mean 'run.steps'"):
        dlm.experiment("demo", {"run.stepz": 100})
    with pytest.raises(UserError, match="run.steps=1.5 must be an integer"):
        dlm.experiment("demo", {"run.steps": 1.5})
    with pytest.raises(UserError, match="unknown experiment 'dmo'; did you mean 'demo'"):
        dlm.experiment("dmo")


def test_the_python_calls_do_what_the_verbs_do(run):
    first, _ = dlm.load(run).generate(["line 1"] * 2, length=4)
    assert first.prompt == "line 1" and len(first.tokens) == 4
