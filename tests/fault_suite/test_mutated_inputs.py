"""Mutated inputs of every verb: each call ends in time, with success or with one line that a terminal obeys nothing of.

    pytest -m slow -n 0 -s tests/fault_suite/test_mutated_inputs.py

`MUTATIONS` (default 1) multiplies the number of calls; `MUTATION_SEED` (default 0) changes them all. A call that fails
is printed with the seed that repeats it: `MUTATION_ONLY=verb:number`.
"""

import collections
import contextlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shutil
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from support import mutations, wrong_paths
from support.command_line import LENGTH, TINY, options
from support.foreign_weights import make_source
from support.tiny_sweep import stub_train, tiny_sweep
from support.tokenizer_files import write_byte_level, write_merges

from diffusionlm.cli import main as cli
from diffusionlm.cli.output import fail
from diffusionlm.compile_check import compile as aot
from diffusionlm.compile_check import table
from diffusionlm.errors import UserError
from diffusionlm.registry import sweeps
from diffusionlm.scaling.sweep import results
from diffusionlm.scaling.sweep.directory import cell_directory, leases_directory, require_identity
from diffusionlm.scaling.sweep.lease import Leases
from diffusionlm.training import loop
from diffusionlm.untrusted import printable

SECONDS = 20  # of a call, most of which take a few milliseconds
FIRST_SECONDS = 120  # of the first call of a verb, which compiles what the others use
BASE_SEED = os.environ.get("MUTATION_SEED", "0")
FACTOR = float(os.environ.get("MUTATIONS", "1"))
ONLY = os.environ.get("MUTATION_ONLY", "")
pytestmark = pytest.mark.slow


class Outcome(NamedTuple):
    """The outcome of a call."""

    kind: str  # "ok", "refused", "traceback", "hang", "exit code" or "stderr"
    detail: str  # one line


def call(function, seconds: float = SECONDS) -> Outcome:
    """Run a call that returns an exit code, and judge what it did."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with wrong_paths.within(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = function()
    except wrong_paths.TookTooLong as error:
        return Outcome("hang", place_of(error))
    except BaseException as error:
        return Outcome("traceback", f"{type(error).__name__}: {str(error)[:120]!r} at {place_of(error)}")
    shown = err.getvalue()
    if code not in (0, 2):
        return Outcome("exit code", f"{code}: {shown[:200]!r}")
    lines = [line for line in shown.splitlines() if line.startswith("diffusionlm: error: ")]
    clean = (shown + out.getvalue()) == printable(shown + out.getvalue(), "\n\t")
    if not clean or len(lines) != (code == 2) or (code == 2 and out.getvalue()):
        return Outcome("stderr", repr(shown[:300]))
    return Outcome("refused" if code == 2 else "ok", lines[0][:200] if lines else "")


def place_of(error: BaseException) -> str:
    """Return the last lines of the package that an error passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/diffusionlm/" in frame.filename]
    paths = [Path(frame.filename) for frame in frames]
    lines = [f"{path.parent.name}/{path.name}:{frame.lineno}" for path, frame in zip(paths, frames, strict=True)]
    return " < ".join(lines[-3:][::-1])


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Return what the verbs read: text, a dataset, a run, released models, tokenizers, a sweep."""
    tmp = tmp_path_factory.mktemp("inputs")
    (tmp / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    rows = [{"text": f"a text of number {i}"} for i in range(40)]
    (tmp / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"instruction": f"{i}?", "input": "", "output": f"{i}!"} for i in range(20)]
    pairs += [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 9
    (tmp / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        args = ["--output", str(tmp / "made"), "--tokenizer", "byte", "--sequence_length", str(LENGTH)]
        assert cli.main(["data", "prepare", str(tmp / "text.txt"), *args]) == 0
        args = ["--workdir", str(tmp / "run"), "--data.path", str(tmp / "made"), *options(TINY)]
        assert cli.main(["train", "demo", *args]) == 0
    for family in ("llama", "gpt2", "llada"):
        make_source(family, tmp / family)
    (tmp / "bytes").mkdir()
    write_byte_level(tmp / "bytes")
    (tmp / "merges").mkdir()
    write_merges(tmp / "merges", "GPT2Tokenizer")
    _make_sweep(tmp / "sweep")
    (tmp / "results").mkdir()
    finished, _ = results.read(sweeps.get("mutated"), tmp / "sweep")
    (tmp / "results" / "results.json").write_text(results.to_json(finished))
    (tmp / "prompts").mkdir()
    (tmp / "prompts" / "prompt.txt").write_text("line 1")
    return {path.name.replace(".", "_"): path for path in tmp.iterdir()}


def _make_sweep(workdir: Path) -> None:
    if "mutated" not in sweeps.names():
        sweeps.register("mutated")(lambda: tiny_sweep(name="mutated"))
    workdir.mkdir()
    require_identity(workdir, {"sweep": "mutated", "dataset": "0" * 64, "unique_tokens": 9999})
    cells = sweeps.get("mutated").select()
    leases = Leases(leases_directory(workdir))
    for cell in cells[:2]:
        lease = leases.claim(cell.id)
        assert lease is not None
        stub_train(cell.config, cell_directory(workdir, cell.id))
        lease.done()
    leases.claim(cells[2].id)


SIZES = " ".join(options(TINY))
PREPARE = "--output {out} --sequence_length 40 --workers 1 --no_progress --validation_fraction 0.3"
# verb -> (calls, the command). Words in braces are places; {out} is a new directory for each call.
ARGUMENTS = {
    "train": (900, f"train demo --workdir {{out}} --data.path {{made}} {SIZES}"),
    "sample": (120, "sample {run} --prompt line --length 4 --steps 2 --count 1 --temperature 0.5 --json"),
    "sample --infill": (60, "sample {run} --infill a{{mask:2}}b --seed 3 --strategy random"),
    "evaluate": (60, "evaluate {run} perplexity --data {text_txt} --limit 1 --json"),
    "import": (150, "import {llada} --output {out} --family llada --mask_id 5 --suppress_mask auto"),
    "export": (150, "export {run} --format llama --output {out} --dtype float32"),
    "compile": (150, "compile demo --part full --topology v5e-4 --slices 1 --count 8 --json"),
    "data prepare": (
        300,
        f"data prepare {{rows_jsonl}} {PREPARE} --tokenizer byte --text_field text",
    ),
    "data inspect": (150, "data inspect {made} --count 2 --split train --json"),
    "experiments": (150, "experiments demo --json"),
    "sweep plan": (150, "sweep plan mutated --mfu 0.4 --chip v5e --price 1.2 --json"),
    "sweep status": (150, "sweep status mutated --workdir {sweep} --json"),
    "sweep run": (100, "sweep run mutated --workdir {out} --lease_seconds 5 --leave --data.path {made}"),
}
# name -> (calls, the place that is copied, a pattern of the files to change, the command)
FILES = {
    "sidecar": (400, "run", "checkpoints/2/sidecar/data.json", "export {copy} --format llama --output {out}"),
    "checkpoint metadata": (150, "run", "checkpoints/2/**/_*METADATA", "export {copy} --format llama --output {out}"),
    "run directory": (
        300,
        "run",
        "*.json*",
        "train demo --workdir {copy} --data.path {made} " + " ".join(options(TINY)),
    ),
    "dataset": (450, "made", "*.json", "data inspect {copy} --count 1"),
    "config.json of llama": (350, "llama", "config.json", "import {copy} --output {out}"),
    "config.json of gpt2": (150, "gpt2", "config.json", "import {copy} --output {out}"),
    "config.json of llada": (150, "llada", "config.json", "import {copy} --output {out}"),
    "safetensors": (250, "gpt2", "model.safetensors", "import {copy} --output {out}"),
    "tokenizer.json": (
        250,
        "bytes",
        "*",
        f"data prepare {{rows_jsonl}} {PREPARE} --tokenizer {{copy}}",
    ),
    "vocabulary and merges": (
        150,
        "merges",
        "*",
        f"data prepare {{rows_jsonl}} {PREPARE} --tokenizer {{copy}}",
    ),
    "rows": (
        250,
        "rows_jsonl",
        "",
        f"data prepare {{copy}} {PREPARE} --tokenizer byte",
    ),
    "instructions": (
        250,
        "pairs_jsonl",
        "",
        f"data prepare {{copy}} {PREPARE} --tokenizer byte --format sft",
    ),
    "sweep directory": (250, "sweep", "**/*", "sweep status mutated --workdir {copy}"),
    "report": (20, "sweep", "**/*", "sweep report mutated --workdir {copy} --output {out}"),
    "prompt file": (60, "prompts", "prompt.txt", "sample {run} --prompt_file {copy}/prompt.txt --length 4 --steps 1"),
    "results.json": (200, "results", "results.json", ""),
}


def _stubbed_train(cfg: Any, workdir: Any, **options: Any) -> Any:
    """Stand in for training: check the configuration as `train` does, and say that it was stopped."""
    return loop.Run(workdir, cfg.validate(), 0, None)


def _stubbed_compile(cfg: Any, topology: str, **options: Any) -> Any:
    cfg.validate()
    return SimpleNamespace(fits=True)


@pytest.fixture
def stubs(monkeypatch):
    """Replace the work of an hour: training, and compiling for a TPU."""
    monkeypatch.setattr(loop, "train", _stubbed_train)
    monkeypatch.setattr(aot, "compile", _stubbed_compile)
    monkeypatch.setattr(table, "to_json", vars)
    monkeypatch.setattr(table, "show", print)


def run_all(name, count, make, tmp_path) -> dict[str, list[tuple[int, str]]]:
    """Make and run the calls of a verb; return the failures by kind, and print the counts."""
    outcomes = collections.Counter()
    failures: dict[str, list[tuple[int, str]]] = {}
    only = ONLY.rpartition(":")
    numbers = range(max(1, round(count * FACTOR)))
    for number in [int(only[2])] if only[0] == name else numbers if not ONLY else []:
        rng = random.Random(f"{BASE_SEED}:{name}:{number}")
        place = tmp_path / str(number)
        place.mkdir()
        outcome = call(make(rng, place))
        outcomes[outcome.kind] += 1
        if outcome.kind not in ("ok", "refused"):
            failures.setdefault(f"{outcome.kind}: {re.sub(r'[0-9]+', 'N', outcome.detail)[-160:]}", []).append(
                (number, outcome.detail)
            )
        shutil.rmtree(place, ignore_errors=True)
    print(f"\n{name}: {sum(outcomes.values())} calls, {dict(outcomes)}")
    for same in failures.values():
        print(f"  {len(same)} x {name}:{same[0][0]}  {same[0][1]}")
    return failures


@pytest.mark.parametrize("name", ARGUMENTS)
def test_mutated_arguments(name, places, tmp_path, stubs, monkeypatch):
    count, command = ARGUMENTS[name]
    monkeypatch.chdir(tmp_path)

    def make(rng, place):
        words = [word.format(out=place / "out", **places) for word in command.split()]
        for _ in range(rng.choice([1, 1, 2])):
            words = mutations.argument(rng, words) if len(words) > 1 else words
        words = words if name == "train" or words[:1] == command.split()[:1] else command.split()[:1] + words
        if "--watch" in words:
            words.remove("--watch")
        return lambda: cli.main(words)

    assert not run_all(name, count, make, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_mutated_files(name, places, tmp_path):
    count, source, pattern, command = FILES[name]

    def make(rng, place):
        copy = place / places[source].name
        if places[source].is_dir():
            shutil.copytree(places[source], copy, symlinks=True)
            files = sorted(file for file in copy.glob(pattern) if file.is_file())
        else:
            shutil.copy(places[source], copy)
            files = [copy]
        for file in [rng.choice(files)] if rng.random() < 0.8 else rng.sample(files, min(2, len(files))):
            if not file.is_file() or file.is_symlink():
                continue
            if file.suffix == ".safetensors" and rng.random() < 0.7:
                mutations.safetensors_header(rng, file)
            else:
                mutations.file(rng, file)
        if not command:
            return lambda: _load_results(copy)
        words = [word.format(copy=copy, out=place / "out", **places) for word in command.split()]
        return lambda: cli.main(words)

    assert not run_all(name, count, make, tmp_path)


def _load_results(directory: Path) -> int:
    """Read the results of a report as a verb would; only Python has such a call."""
    try:
        results.load(directory / "results.json")
    except (UserError, OSError) as error:
        return fail(str(error), 2)
    return 0


@pytest.mark.parametrize("name", [*ARGUMENTS, *FILES])
def test_without_a_mutation_each_call_succeeds(name, places, tmp_path, stubs):
    if name == "compile" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e .[tpu]")
    *_, command = (ARGUMENTS | FILES)[name]
    if name in FILES:
        source = places[FILES[name][1]]
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / source.name)
        places = places | {"copy": tmp_path / source.name}
    words = [word.format(out=tmp_path / "out", **places) for word in command.split()]
    function = (lambda: cli.main(words)) if command else (lambda: _load_results(places["copy"]))
    outcome = call(function, FIRST_SECONDS)
    assert outcome.kind == "ok", outcome


def test_there_are_enough():
    counts = [count for count, *_ in itertools.chain(ARGUMENTS.values(), FILES.values())]
    assert sum(counts) >= 5000
