"""The verb `sample`: completions, gaps, traces and pages."""

import io
import json
import os
import re
import sys

import pytest
from support.command_line import LENGTH, TINY, assert_one_line, options

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.cli import sample
from diffusionlm.cli.sample import _read_prompt
from diffusionlm.console import KEPT
from diffusionlm.errors import UserError
from diffusionlm.untrusted import printable


@pytest.mark.slow
def test_sample_fills_gaps(run, capsys):
    capsys.readouterr()
    args = ["sample", str(run), "--infill", "once{mask:3}time", "--count", "2", "--temperature", "0.3"]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert cli.main([*args, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [set(completion) for completion in answer["completions"]] == [
        {"prompt", "text", "tokens", "nfe", "seconds", "mask_tokens"}
    ] * 2
    for completion in answer["completions"]:
        assert completion["prompt"] == "once{mask:3}time" and len(completion["tokens"]) == 1 + 4 + 3 + 4
        assert completion["text"].startswith("once") and completion["text"].endswith("time")
    assert (answer["config"]["length"], answer["config"]["steps"], answer["config"]["temperature"]) == (3, 3, 0.3)
    assert out == "".join(
        f"--- {i} of 2\n{completion['text']}\n" for i, completion in enumerate(answer["completions"], start=1)
    )


def test_a_space_in_a_gap_is_one_line_and_exit_code_2(run, capsys):
    capsys.readouterr()
    assert cli.main(["sample", str(run), "--infill", "a {mask: 8} b"]) == 2
    assert_one_line(capsys.readouterr(), ["'{mask: 8}' is not a gap", "write {mask:N} without spaces"])


@pytest.mark.slow
@pytest.mark.parametrize("what", [["--prompt", "line", "--length", "4"], ["--infill", "line{mask:4} of"]])
def test_sample_writes_a_page_and_prints_the_same(run, what, tmp_path, capsys):
    args = ["sample", str(run), *what, "--count", "2", "--json"]
    capsys.readouterr()
    texts = []
    for words in ([], ["--html", str(tmp_path / "trace.html")]):
        assert cli.main([*args, *words]) == 0
        texts.append([completion["text"] for completion in json.loads(capsys.readouterr().out)["completions"]])
    assert texts[0] == texts[1]
    page = (tmp_path / "trace.html").read_text()
    assert page.count("<section") == 2 and page.endswith("</html>\n")


@pytest.mark.slow
def test_sample_shows_the_trace(run, capsys):
    for what in (["--prompt", "line", "--length", "4"], ["--infill", "line{mask:4} of"]):
        capsys.readouterr()
        assert cli.main(["sample", str(run), *what, "--trace"]) == 0
        out = capsys.readouterr().out
        # An infilling begins with the token before the text, and masks are as wide as what comes there.
        assert re.match("step 0/4\n(⟨eos⟩)?line░{4,}( of)?\nstep 1/4\n", out), out
        assert re.search("\nstep 4/4\n(⟨eos⟩)?line[^░]*\n$", out), out
        assert "{mask" not in out


def test_a_page_that_cannot_be_written_is_refused_before_any_work(monkeypatch, tmp_path, capsys):
    from diffusionlm.pretrained import loading

    monkeypatch.setattr(loading, "load", lambda path: pytest.fail("loaded"))
    assert cli.main(["sample", "x", "--html", str(tmp_path / "none" / "trace.html")]) == 2
    assert_one_line(capsys.readouterr(), ["does not exist"])


@pytest.mark.slow
def test_sample_json_has_the_agreed_keys(run, tmp_path, capsys):
    (tmp_path / "prompt").write_text("line 1\n")
    capsys.readouterr()
    args = ["--prompt_file", str(tmp_path / "prompt"), "--length", "4", "--count", "2", "--seed", "3", "--json"]
    assert cli.main(["sample", str(run), *args]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"completions", "config", "checkpoint", "passed_over"}
    assert [set(completion) for completion in answer["completions"]] == [
        {"prompt", "text", "tokens", "nfe", "seconds", "mask_tokens"}
    ] * 2
    assert [completion["prompt"] for completion in answer["completions"]] == ["line 1"] * 2
    assert answer["config"]["length"] == len(answer["completions"][0]["tokens"]) == 4
    assert answer["config"]["seed"] == 3


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"\xef\xbb\xbfa line\n", "a line"),
        (b"a line\r\nand another\r\n", "a line\r\nand another"),
        (b"a line\n\n", "a line\n"),
        (b"a\rline\r", "a\rline\r"),
        (b"\xef\xbb\xbf", ""),
        ("a line with \ufeff inside".encode(), "a line with \ufeff inside"),
    ],
)
def test_a_prompt_file_is_taken_as_it_is_but_for_its_mark_and_last_line_break(content, prompt, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_bytes(content)
    assert _read_prompt(str(tmp_path / "prompt")) == prompt
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert _read_prompt("-") == prompt


def test_a_prompt_that_is_no_file_of_text_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "bytes").write_bytes(b"a \xff line")
    (tmp_path / "pointer").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("bytes", "is not UTF-8 text: byte 2 is 0xff"),
        ("pointer", "is a Git LFS pointer, not the file"),
        ("pipe", "is a pipe; only files are read here"),
        ("none", "No such file"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            _read_prompt(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is a device"):
        _read_prompt("/dev/zero")
    monkeypatch.setattr(sample, "LONGEST_PROMPT", 3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"four")))
    with pytest.raises(UserError, match="standard input has more than 3 bytes"):
        _read_prompt("-")


def test_bytes_of_a_prompt_that_are_no_text_are_one_line(run, capsys):
    """Python stands in half surrogate pairs for bytes of the command line that are not UTF-8 (PEP 383)."""
    for option in ("--prompt", "--infill"):
        capsys.readouterr()
        assert cli.main(["sample", str(run), option, os.fsdecode(b"a \xff {mask:2}")]) == 2
        assert_one_line(capsys.readouterr(), ["has the byte 0xff, which is not UTF-8, at character 2"])


@pytest.mark.slow
def test_sample_reports_the_agreement_of_a_cache_with_the_exact_loop(run, capsys):
    """A cache that is always refreshed agrees; without refreshes the share of equal tokens is reported."""
    plain = ["--prompt", "line 1", "--length", "8", "--block_length", "8", "--count", "2", "--json"]
    args = [*plain, "--cache", "dual", "--agreement"]
    capsys.readouterr()
    assert cli.main(["sample", str(run), *args, "--refresh", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"] == 1.0
    assert cli.main(["sample", str(run), *args]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert cli.main(["sample", str(run), *plain]) == 0
    exact = json.loads(capsys.readouterr().out)
    tokens, exact_tokens = (
        [token for completion in reply["completions"] for token in completion["tokens"]] for reply in (answer, exact)
    )
    assert (
        answer["agreement"] == sum(a == b for a, b in zip(tokens, exact_tokens, strict=True)) / 16
        and answer["times"] > 0
    )
    assert cli.main(["sample", str(run), "--infill", "a {mask:2}", "--agreement"]) == 2
    assert "agreement" in capsys.readouterr().err


def test_sample_prints_the_prompt_and_its_completion(run, capsys):
    args = ["--prompt", "line 1", "--length", "4", "--count", "2"]
    capsys.readouterr()
    assert cli.main(["sample", str(run), *args, "--json"]) == 0
    texts = [completion["text"] for completion in json.loads(capsys.readouterr().out)["completions"]]
    assert cli.main(["sample", str(run), *args]) == 0
    shown = [printable(f"line 1{text}", KEPT) for text in texts]
    assert capsys.readouterr().out == f"--- 1 of 2\n{shown[0]}\n--- 2 of 2\n{shown[1]}\n"


@pytest.mark.slow
def test_from_instructions_to_an_answer(run, tmp_path, capsys):
    """Prepared with the tokenizer of a model, which is then fine-tuned and asked."""
    pairs = [{"question": f"{i}?", "answer": f"{i}!"} for i in range(200)]
    (tmp_path / "asked.json").write_text(json.dumps(pairs))
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
        assert capsys.readouterr().out == printable(f"7?{text}\n", KEPT)


def test_the_python_calls_do_what_the_verbs_do(run):
    first, _ = dlm.load(run).generate(["line 1"] * 2, length=4)
    assert first.prompt == "line 1" and len(first.tokens) == 4
