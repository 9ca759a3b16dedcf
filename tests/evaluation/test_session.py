"""An evaluation that is interrupted goes on where it stopped, and records of another one are refused."""

import json

import pytest
from support.command_line import assert_one_line
from support.tiny_checkpoint import save

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.errors import UserError
from diffusionlm.evaluation import perplexity
from diffusionlm.evaluation import session as session_module
from diffusionlm.evaluation.session import Session

TEXTS = ["first", "second text", "a third", "the fourth of them", "fifth"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, and its own texts."""
    directory = tmp_path_factory.mktemp("session")
    texts = directory / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {"mdm": save(directory / "mdm"), "other": save(directory / "other"), "texts": str(texts)}


def run(files, output, **options):
    settings = dlm.LikelihoodConfig(draws=2)
    return dlm.evaluate(files["mdm"], "perplexity", data=files["texts"], settings=settings, output=output, **options)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(files, tmp_path, monkeypatch):
    """The figures are those of an evaluation in one piece, and no item is scored twice."""
    whole = run(files, None)
    output, scored = tmp_path / "result.json", []
    monkeypatch.setattr(perplexity, "DOCUMENTS", 2)
    likelihood = perplexity.likelihood

    def dies(params, cfg, documents, *args, **kwargs):
        scored.extend(len(document) for document in documents)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return likelihood(params, cfg, documents, *args, **kwargs)

    monkeypatch.setattr(perplexity, "likelihood", dies)
    with pytest.raises(KeyboardInterrupt):
        run(files, output)
    assert not output.exists()
    records = tmp_path / "result.items.jsonl"
    records.write_text(records.read_text() + '{"item": 2, "sha2')  # a line that a kill cut short
    resumed = run(files, output, resume=True)
    assert resumed.metrics == whole.metrics and resumed.forwards == whole.forwards
    assert scored[4:] == [len(text) + 1 for text in TEXTS[2:]]
    saved = json.loads(output.read_text())
    assert saved["metrics"]["nats_per_token"]["value"] == whole.metrics["nats_per_token"].value
    assert saved["seconds"] > 0 and saved["records"] == records.name and len(saved["params_sha256"]) == 64
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert len({line["sha256"] for line in lines[1:]}) == len(lines[1:]) == 5


def test_an_item_that_changed_is_computed_again(files, tmp_path):
    session = Session(dlm.load(files["mdm"]))
    session.open_records(tmp_path / "a.jsonl", "task", {}, resume=False)
    assert session.evaluate("t", ["x", "y"], lambda batch: [{"v": i} for i in batch], 1) == [{"v": 0}, {"v": 1}]
    again = Session(dlm.load(files["mdm"]))
    again.open_records(tmp_path / "a.jsonl", "task", {}, resume=True)
    assert again.evaluate("t", ["x", "z"], lambda batch: [{"v": 10 + i} for i in batch], 1) == [{"v": 0}, {"v": 11}]


def test_steps_and_equal_items_are_told_apart(files, tmp_path):
    """Two steps have an item in common, and the first step has it twice; an earlier run had another limit."""

    def steps(session, n):
        first = session.evaluate("one", ["x", "y", "x", "z"][:n], lambda batch: [{"v": i} for i in batch], 4)
        return first + session.evaluate("two", ["x"], lambda batch: [{"v": 9}], 4)

    for resume, n in ((False, 2), (True, 4)):
        session = Session(dlm.load(files["mdm"]))
        session.open_records(tmp_path / "a.jsonl", "task", {}, resume=resume)
        assert [record["v"] for record in steps(session, n)] == [*range(n), 9]
    session = Session(dlm.load(files["mdm"]))
    session.open_records(tmp_path / "a.jsonl", "task", {}, resume=True)
    records = [session.evaluate("one", ["x"], pytest.fail, 4), session.evaluate("two", ["x"], pytest.fail, 4)]
    assert records == [[{"v": 0}], [{"v": 9}]]


def test_a_refused_evaluation_leaves_no_file(files, tmp_path):
    output = tmp_path / "new" / "result.json"
    settings = dlm.LikelihoodConfig(draws=2, passes=2)
    with pytest.raises(UserError, match="passes=2"):
        dlm.evaluate(files["mdm"], "perplexity", data=files["texts"], settings=settings, output=output)
    assert not list(tmp_path.iterdir())
    run(files, output)
    assert output.exists() and (tmp_path / "new" / "result.items.jsonl").exists()
    blocked = output / "result.json"
    with pytest.raises(UserError, match="output=.* must be a directory"):
        run(files, blocked)


def test_records_of_another_version_are_refused(files, tmp_path):
    output = tmp_path / "result.json"
    run(files, output)
    records = tmp_path / "result.items.jsonl"
    header, *lines = records.read_text().splitlines()
    records.write_text("\n".join([json.dumps(json.loads(header) | {"version": "0.0.1"}), *lines, ""]))
    with pytest.raises(UserError, match="of diffusionlm 0.0.1, and this is"):
        run(files, output, resume=True)


def test_records_come_back_in_the_order_of_the_items(files):
    session, seen = Session(dlm.load(files["mdm"])), []

    def compute(batch):
        seen.append(list(batch))
        return [{"v": i} for i in batch]

    assert session.evaluate("t", ["a", "b", "c"], compute, 2, order=[2, 0, 1]) == [{"v": 0}, {"v": 1}, {"v": 2}]
    assert seen == [[2, 0], [1]]


@pytest.mark.slow
def test_records_of_another_evaluation_are_refused(files, tmp_path):
    output = tmp_path / "result.json"
    run(files, output)
    with pytest.raises(UserError, match="exists; give another output, or replace it with --resume"):
        run(files, output)
    output.unlink()
    with pytest.raises(UserError, match="holds the records of an evaluation; continue it with --resume"):
        run(files, output)
    message = r'holds an evaluation with field="text", stride=null, and this command has field="body", stride=4; '
    with pytest.raises(UserError, match=f"{message}set --field text and leave out --stride, or give another --output"):
        run(files, output, resume=True, field="body", stride=4)
    with pytest.raises(UserError, match=r"with draws=2, and this command has draws=3; set --draws 2, or give another"):
        dlm.evaluate(
            files["mdm"],
            "perplexity",
            data=files["texts"],
            settings=dlm.LikelihoodConfig(draws=3),
            output=output,
            resume=True,
        )
    with pytest.raises(UserError, match="of a checkpoint with other parameters"):
        run({**files, "mdm": files["other"]}, output, resume=True)
    with pytest.raises(UserError, match="of the task 'perplexity', not 'infilling'"):
        dlm.evaluate(files["mdm"], "infilling", data=files["texts"], output=output, resume=True)
    assert run(files, output, resume=True, limit=3).metrics["documents"].value == 3  # the others are kept for later
    assert len((tmp_path / "result.items.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("line", "parts"),
    [("[]", ["line 2"]), ('{"seconds": 1}', ["line 2", "sha256"]), ('{"sha256": "x"}', ["line 2", "sha256"])],
)
def test_a_damaged_record_is_one_line(files, tmp_path, line, parts, capsys):
    output = tmp_path / "result.json"
    args = ["evaluate", files["mdm"], "perplexity", "--data", files["texts"], "--draws", "2", "--output", str(output)]
    assert cli.main(args) == 0 and output.exists()
    records = tmp_path / "result.items.jsonl"
    header, *lines = records.read_text().splitlines()
    records.write_text("\n".join([header, line, *lines, ""]))
    capsys.readouterr()
    assert cli.main([*args, "--resume"]) == 2
    assert_one_line(capsys.readouterr(), ["result.items.jsonl", *parts])


def test_a_batch_that_takes_minutes_shows_how_much_of_it_is_done(files, monkeypatch):
    """Items are counted as far as their batch has come, and no record counts before it is there."""
    shown = []
    monkeypatch.setattr(
        session_module.Progress, "update", lambda self, completed, note: shown.append((completed, note))
    )
    session = Session(dlm.load(files["mdm"]))

    def compute(batch):
        for share in (0.25, 0.5, 1.0):
            session.show(share)
        return [{}] * len(batch)

    session.evaluate("t", [*range(12)], compute, 8)
    assert shown == [
        (2, "25% of a batch of 8"),
        (4, "50% of a batch of 8"),
        (8, ""),
        (9, "25% of a batch of 4"),
        (10, "50% of a batch of 4"),
        (12, ""),
    ]


def test_perplexity_shows_its_passes(files, monkeypatch):
    shares = []
    monkeypatch.setattr(Session, "show", lambda self, share: shares.append(share))
    run(files, None)
    assert len(shares) > 1 and shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1
