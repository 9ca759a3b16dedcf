"""The verb `data inspect`."""

import json

from diffusionlm.cli import main as cli


def test_data_inspect_shows_the_text(dataset, capsys):
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(dataset), "--count", "1"]) == 0
    assert "line 0 of a text" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(dataset), "--count", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["records"][0]["documents"] == ["line 0 of a text\n"]  # a record is LENGTH + 1 bytes
