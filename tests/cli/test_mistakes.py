"""Every mistake of a user is one line on stderr and exit code 2."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest
from support.command_line import PLAIN, TINY, assert_one_line, options
from support.invalid_configs import INVALID
from support.slow_cases import thinned

from diffusionlm.cli import main as cli


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
    ("app {tmp}/none --port 0", ["port=0", "65535"]),
    ("app {tmp}/none --steps 0", ["steps=0", "from 1"]),
    ("app {tmp}/none --prot 80", ["'prot'", "'port'"]),
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
    ("train demo ---run.steps 3", ["'---run.steps'", "'run.steps'"]),
    ("train demo -run.steps 3", ["'-run.steps'", "'run.steps'"]),
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
    ("train demo --workdir {tmp}/file", ["workdir={tmp}/file must be a directory", "it is a file"]),
    ("train demo --workdir {tmp}/file/run", ["workdir={tmp}/file/run must be a directory", "{tmp}/file is a file"]),
    ("train demo --workdir {tmp}/w --data.path {tmp}/file", ["dataset '{tmp}/file' is a file, not a directory"]),
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
    ("sample {tmp}/file", ["{tmp}/file", "is a file, not a directory", "a run directory"]),
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
    ("sample x --prompt_file {tmp}/binary.txt", ["{tmp}/binary.txt", "UTF-8"]),
    ("sample x --infill a --prompt b", ["infill='a'", "excludes prompt", "drop"]),
    ("sample x --infill a --prompt_file b", ["infill='a'", "prompt_file", "drop"]),
    ("sample x --json --trace", ["json", "trace", "drop one"]),
    ("sample x --raw --infill a", ["raw", "infill", "drop one"]),
    ("sample x --html {tmp}/none/trace.html", ["{tmp}/none/trace.html", "does not exist"]),
    ("sample x --html {tmp}/file/trace.html", ["{tmp}/file/trace.html", "{tmp}/file' is a file; choose another"]),
    ("sample x --html {tmp}", ["{tmp}", "not a file"]),
    ("sample {run} --infill none", ["'none' has no gap", "{{mask:8}}"]),
    ("sample {run} --infill a{{mask:0}}b", ["'{{mask:0}}' is not a gap", "{{mask:N}}", "from 1 to"]),
    ("sample {run} --infill a{{mask:abc}}b", ["'{{mask:abc}}' is not a gap", "{{mask:N}}", "from 1 to"]),
    ("data prepare --output {tmp}/o --sequence_length 8", ["SOURCE"]),
    ("data prepare {tmp}/file", ["missing --output (", " and --sequence_length (", "--help"]),
    (
        "data prepare {tmp}/broken.jsonl --output {tmp}/file --sequence_length 8 --tokenizer byte",
        ["output={tmp}/file must be a directory", "it is a file", "another"],
    ),
    (
        "data prepare {tmp}/broken.jsonl --output {tmp}/file/x --sequence_length 8 --tokenizer byte",
        ["output={tmp}/file/x must be a directory", "{tmp}/file is a file", "another"],
    ),
    ("import", ["missing SOURCE (", " and --output ("]),
    (
        "import {run} --output {tmp}/o",
        ["{run} is a checkpoint of diffusionlm", "no import", "diffusionlm sample {run}"],
    ),
    ("export {run} --format lama --output {tmp}/o", ["format='lama'", "gpt2, llama, mistral"]),
    ("evaluate {run}", ["missing TASK", "perplexity, infilling"]),
    ("sweep status {tmp}", ["'{tmp}' is a directory", "sweep status NAME [--workdir DIR]", "smdm_isoflop"]),
    ("sweep run {tmp}/none", ["unknown sweep '{tmp}/none'", "sweep run NAME [--workdir DIR]", "smdm_isoflop"]),
    ("sweep report isoflop_cp", ["'isoflop_cp'; did you mean 'isoflop_cpu'?"]),
    ("sweep report {tmp}/none.csv --output {tmp}/o", ["cannot read {tmp}/none.csv: No such file"]),
    ("sweep report {tmp}/none.csv", ["give the report one", "--output DIR"]),
    ("sweep report isoflop_cpu --noise 0", ["noise='0' must be the standard deviation", "'residuals'"]),
    ("sweep report isoflop_cpu --unit bytes", ["unit=bytes", "nats", "bits"]),
    ("sweep status isoflop_cpu --workdir {tmp}/file", ["workdir={tmp}/file must be a directory"]),
    ("train {run}", ["'{run}' is a directory", "train EXPERIMENT [--workdir DIR]", "demo"]),
    (
        "export {tmp}/x --format llama --output {tmp}/o --dtype bf16",
        ["dtype=bf16", "float32, bfloat16, float16, or be left out"],
    ),
    (
        "data prepare python_dcs --output {tmp}/o --sequence_length 8 --tokenizer byte",
        ["'python_dcs'", "'python_docs'"],
    ),
    (
        "data prepare {tmp}/broken.jsonl --output {tmp}/o --sequence_length 8 --tokenizer byte --no_progress",
        ["{tmp}/broken.jsonl:2", "--on_error skip"],
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
        ["{tmp}/broken.jsonl:1", "'text' are of no known shape", "prompt+response", "--on_error skip"],
    ),
    (
        "data prepare {tmp}/broken.jsonl --output {tmp}/o --sequence_length 8 --tokenizer {tmp}",
        ["{tmp}", "no diffusionlm checkpoint"],
    ),
    ("train tinystories_sft --workdir {tmp}/w --run.init_from {tmp}/none", ["run.init_from", "{tmp}/none"]),
    ("data inspect {tmp}/none", ["{tmp}/none", "does not exist"]),
    ("data inspect {tmp}/file", ["dataset '{tmp}/file' is a file, not a directory", "data prepare"]),
    ("data inspect {dataset} --split tset", ["'tset'", "train, validation"]),
    ("data inspect {dataset} --count -1", ["count=-1"]),
    ("experiments demoo", ["'demoo'", "'demo'"]),
    ("experiments demo demo_arm", ["'demo_arm'"]),
]


@pytest.mark.parametrize("command, parts", thinned(WRONG, every=2), ids=[command for command, _ in WRONG])
def test_a_mistake_is_one_line_and_exit_code_2(command, parts, places, capsys):
    args = words(command, places)
    capsys.readouterr()
    code = cli.main(args)
    assert_one_line(capsys.readouterr(), [part.format(**places) for part in parts])
    assert code == 2


# Every message is tested with the configuration; here only that the command shows it.
OF_THE_COMMAND = [pytest.param(*case, marks=[pytest.mark.slow] if i % 8 else []) for i, case in enumerate(INVALID)]


@pytest.mark.parametrize("overrides, parts", OF_THE_COMMAND)
def test_a_value_out_of_range_is_one_line_and_exit_code_2(overrides, parts, tmp_path, capsys):
    code = cli.main(["train", "demo", "--workdir", str(tmp_path / "run"), *options(PLAIN | overrides)])
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
        pytest.param(
            "train demo --workdir {tmp}/w --data.path {dataset} --model.vocab_size 99",
            ["257", "99"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_in_a_real_process(command, parts, places):
    script = [sys.executable, "-m", "diffusionlm"]
    done = subprocess.run([*script, *words(command, places)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("diffusionlm: error: ")
    assert all(part in done.stderr for part in parts)
