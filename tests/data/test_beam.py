"""Apache Beam makes the dataset that one machine makes, and goes on after it was killed."""

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.datasets import prepare

from diffusionlm.cli import main as cli
from diffusionlm.cli.data import _before_and_after_dashes
from diffusionlm.data import beam_runner, text_files
from diffusionlm.errors import StorageError, UserError

NEEDS_BEAM = "needs the package apache-beam (extra beam)"
SEVERAL = ["--direct_num_workers=4", "--direct_running_mode=multi_processing"]
PROGRAM = """
import functools, sys
from diffusionlm.data import text_files
from diffusionlm.data.prepare import prepare

if __name__ == "__main__":
    small = functools.partialmethod(text_files.Files.pieces, piece_bytes=400, group_bytes=100)
    text_files.Files.pieces = small
    source, output, *options = sys.argv[1:]
    prepare(source, output, tokenizer="byte", sequence_length=15, validation_fraction=0, progress=False,
            drop_duplicates=True, runner="beam" if options else "local", beam_options=options)
"""


@pytest.fixture
def beam():
    return pytest.importorskip("apache_beam", reason=NEEDS_BEAM)


@pytest.fixture
def many_pieces(monkeypatch):
    small = functools.partialmethod(text_files.Files.pieces, piece_bytes=400, group_bytes=100)
    monkeypatch.setattr(text_files.Files, "pieces", small)


def content(directory):
    """Return the files of a dataset by name, but for the stamps of its sources, which `meta.json` keeps."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "meta.json"}


@pytest.mark.filterwarnings("ignore")  # Beam's own
def test_the_dataset_is_that_of_one_machine(beam, jsonl, tmp_path, many_pieces):
    options = {"drop_duplicates": True, "validation_fraction": 0.2}
    local = prepare(jsonl, tmp_path / "local", **options)
    made = prepare(jsonl, tmp_path / "beam", runner="beam", **options)
    assert (made.sha256, made.splits, made.left_out) == (local.sha256, local.splits, local.left_out)
    assert content(tmp_path / "beam") == content(tmp_path / "local")


@pytest.mark.filterwarnings("ignore")  # Beam's own
def test_a_malformed_line_is_one_line(beam, tmp_path, many_pieces):
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n' * 60 + '{"text": "cut off\n')
    with pytest.raises(UserError, match=r"broken.jsonl:61: invalid JSON"):
        prepare(str(tmp_path / "broken.jsonl"), tmp_path / "out", runner="beam")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_four_workers_make_the_same_dataset_and_a_killed_pipeline_goes_on(beam, jsonl, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), jsonl]
    subprocess.run([*command, str(tmp_path / "local")], check=True)
    with subprocess.Popen([*command, str(tmp_path / "out"), *SEVERAL], start_new_session=True) as process:
        while len(receipts := [*tmp_path.glob(".out.partial-*/parts/0*.json")]) < 3 and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in receipts}
    subprocess.run([*command, str(tmp_path / "again"), *SEVERAL], check=True)
    resumed = subprocess.Popen([*command, str(tmp_path / "out"), *SEVERAL])
    while resumed.poll() is None:
        for path in [path for path in done if path.exists()]:
            assert path.stat().st_mtime_ns == done[path], "a finished part was made again"
        time.sleep(0.05)
    assert resumed.returncode == 0 and done
    assert content(tmp_path / "out") == content(tmp_path / "again") == content(tmp_path / "local")


@pytest.mark.filterwarnings("ignore")  # Beam's own
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--direct_num_worker=4"], "Beam has no option --direct_num_worker=4;"),
        (["-runner", "DataflowRunner"], "Beam has no option -runner;"),
        (["runner=DataflowRunner"], "Beam has no option runner=DataflowRunner;"),
        (["--direct_num_workers=abc"], "invalid int value: 'abc'"),
    ],
)
def test_an_unknown_option_of_beam_is_one_line(words, message, beam, jsonl, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        prepare(jsonl, tmp_path / "out", runner="beam", beam_options=words)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Beam's own
def test_the_options_of_the_documentation_are_beams(beam):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (words,) = re.findall(r"--runner beam -- (--runner=DataflowRunner.*)", text)
    options = beam_runner.require_beam(words.split()).get_all_options()
    assert options["runner"] == "DataflowRunner" and options["extra_packages"] and options["max_num_workers"] == 100


@pytest.mark.filterwarnings("ignore")  # Beam's own
def test_the_options_of_the_script_for_dataflow_are_beams(beam):
    script = Path(__file__).parents[2] / "tpu_scripts" / "dataflow.sh"
    command = [
        "bash",
        str(script),
        "name",
        "--output=gs://bucket/o",
        "--region=us-central1",
        "--project=p",
        "--machine=n2",
    ]
    command += ["--service-account=a@p", "--dry-run", "--", "data", "prepare", "gs://bucket/*.jsonl"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    options = beam_runner.require_beam(shlex.split(shown.partition(" -- ")[2])).get_all_options(drop_default=True)
    assert options["runner"] == "DataflowRunner" and options["service_account_email"] == "a@p"
    assert options["max_num_workers"] == 100 and len(options) == 10


class Asynchronous:
    """The result of a pipeline that goes on while it is asked, as that of a cluster."""

    def __init__(self, states):
        self._states, self.cancelled = iter(states), False
        self._state = None

    @property
    def state(self):
        self._state = next(self._states, self._state)
        return self._state

    def cancel(self):
        self.cancelled = True

    def wait_until_finish(self):
        return self._state


class Job:
    def __init__(self, receipt):
        self.receipt = str(receipt)


def test_a_pipeline_that_ends_early_is_one_line_and_one_that_is_not_needed_is_cancelled(beam, tmp_path, monkeypatch):
    monkeypatch.setattr(beam_runner, "POLL_SECONDS", 0.0)
    jobs = [Job(tmp_path / "a.json"), Job(tmp_path / "b.json")]
    (tmp_path / "a.json").write_text('{"number": 1}')
    receipts = beam_runner._receipts(Asynchronous(["RUNNING", "RUNNING", "FAILED"]), jobs)
    assert next(receipts) == {"number": 1}
    with pytest.raises(StorageError, match=r"ended \(FAILED\) before .*b.json was written"):
        next(receipts)
    result = Asynchronous(["RUNNING"])
    receipts = beam_runner._receipts(result, jobs)
    next(receipts)
    receipts.close()
    assert result.cancelled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "spark"}, "runner='spark' must be 'local' or 'beam'"),
        ({"runner": "beam", "workers": 2}, "-- --direct_num_workers 2"),
        ({"beam_options": ["--project=p"]}, "--project=p after -- are options of Beam; add --runner beam"),
        ({"output": "gs://bucket/data"}, "or use --runner beam"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(options, message, jsonl, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(jsonl, **{"output": tmp_path / "out"} | options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_package_the_message_says_how_to_get_it(jsonl, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="beam"):
        prepare(jsonl, tmp_path / "out", runner="beam")


def test_words_after_dashes_are_beams():
    assert _before_and_after_dashes(["a", "--b", "--", "--c", "d"]) == (["a", "--b"], ["--c", "d"])
    assert _before_and_after_dashes(["a"]) == (["a"], [])


def test_a_dry_run_writes_nothing_and_shows_the_plan(jsonl, tmp_path, capsys):
    words = ["--output", str(tmp_path / "out"), "--sequence_length", "15", "--tokenizer", "byte", "--dry_run"]
    assert cli.main(["data", "prepare", jsonl, *words]) == 0
    shown = capsys.readouterr().out
    assert "bytes in 1 pieces" in shown and "records of 16 tokens" in shown and "runner: local, 1 processes" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
