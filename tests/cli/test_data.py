"""The verbs `data prepare` and `data inspect`."""

import json

from diffusionlm.cli import main as cli


def test_conditions_may_be_given_together_or_one_by_one(tmp_path, capsys):
    records = [{"text": f"text {i}", "lang": "en" if i % 2 else "de", "stars": i} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    common = [str(tmp_path / "a.jsonl"), "--tokenizer", "byte", "--sequence_length", "3", "--validation_fraction", "0"]
    for name, conditions in {
        "together": ["--where", "lang=en", "stars>=10"],
        "one by one": ["--where", "lang=en", "--where", "stars>=10"],
        "with equals signs": ["--where=lang=en", "--where=stars>=10"],
    }.items():
        output = tmp_path / name
        assert cli.main(["data", "prepare", *common, *conditions, "--output", str(output)]) == 0
        metadata = json.loads((output / "meta.json").read_text())
        assert metadata["left_out"] == {"where=lang=en": 20, "where=stars>=10": 5}
        assert metadata["splits"]["train"]["documents"] == 15
    assert "20 documents were left out by where=lang=en" in capsys.readouterr().err


def test_data_inspect_shows_the_text(dataset, capsys):
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(dataset), "--count", "1"]) == 0
    assert "line 0 of a text" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(dataset), "--count", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["records"][0]["documents"] == ["line 0 of a text\n"]  # a record is LENGTH + 1 bytes
