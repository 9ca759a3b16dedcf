"""Cards say what the files of a run say, in a form that the Hub reads."""

import dataclasses
import json

import pytest
from huggingface_hub import ModelCard
from support import tiny_chat
from support.tiny_checkpoint import save

import diffusionlm as dlm
from diffusionlm import config_io
from diffusionlm.checkpoint import store
from diffusionlm.cli import main as cli
from diffusionlm.errors import UserError
from diffusionlm.sharing.card import model_card


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A params-only checkpoint, a result of it, and another checkpoint."""
    folder = tmp_path_factory.mktemp("card")
    model = save(folder / "model")
    (folder / "texts.jsonl").write_text('{"text": "first"}\n{"text": "second | text"}\n')
    settings = dlm.LikelihoodConfig(draws=2)
    output = folder / "result.json"
    dlm.evaluate(model, "perplexity", data=str(folder / "texts.jsonl"), settings=settings, output=output)
    return {"model": model, "result": output, "other": save(folder / "other")}


@pytest.mark.slow
def test_a_card_has_the_counts_and_the_results(evaluated):
    text = model_card(evaluated["model"], name="me/model", evaluations=[evaluated["result"]], license="apache-2.0")
    model, result = dlm.load(evaluated["model"]), json.loads(evaluated["result"].read_text())
    assert f"| Parameters | {dlm.flops.parameters(model.config.model).total:,} (" in text
    assert 'dlm.load("hf://me/model")' in text
    assert "### perplexity on texts.jsonl" in text
    nats = result["metrics"]["nats_per_token"]
    assert f"| nats\\_per\\_token | {nats['value']:.4g} | {nats['stderr']:.4g} |" in text
    assert str(evaluated["result"].parent) not in text, "a path of somebody's disk"


def test_the_hub_reads_the_front_matter(evaluated):
    text = model_card(evaluated["model"], name="me/model", evaluations=[evaluated["result"]], license="apache-2.0")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusionlm", "text-generation", "apache-2.0")
    assert "masked-diffusion" in data.tags
    values = {each.metric_type: each.metric_value for each in data.eval_results}
    metrics = json.loads(evaluated["result"].read_text())["metrics"]
    assert values == {name: metric["value"] for name, metric in metrics.items()}
    assert {each.dataset_name for each in data.eval_results} == {"texts.jsonl"}


def test_a_result_of_other_parameters_is_refused(evaluated):
    with pytest.raises(UserError, match="is a result of .*, whose parameters are not those of"):
        model_card(evaluated["other"], evaluations=[evaluated["result"]])


def test_a_name_is_shown_and_not_rendered(evaluated):
    text = model_card(evaluated["model"], name="<b>[x](y)|\x1b[31m")
    assert "# \\<b\\>\\[x\\](y)\\|" in text and "\x1b" not in text


def saved(path, model, **changes):
    """Copy a checkpoint with other fields of its sidecar."""
    sidecar = dataclasses.replace(store.load_sidecar(model), **changes)
    store.save_params(path, store.load_params(model), sidecar)
    return path


def test_only_a_name_that_is_given_and_valid_is_an_address(evaluated, tmp_path):
    assert 'dlm.load("hf://me/model")' in model_card(evaluated["model"], name="hf://me/model")
    for name in ("a/b/c", 'a/b"); evil("', "a/b@main", "/tmp/model"):
        assert 'dlm.load("DIRECTORY")' in model_card(evaluated["model"], name=name)
    foreign = "a/b\n```\n<img src=x onerror=alert(1)>\n```"
    path = saved(tmp_path / "foreign", evaluated["model"], source={"experiment": foreign})
    text = model_card(path)
    assert 'dlm.load("DIRECTORY")' in text and "hf://" not in text
    assert all(line.startswith(("# a/b", "| Experiment |")) for line in text.splitlines() if "img" in line)
    path = saved(tmp_path / "named", evaluated["model"], source={"experiment": "me/model"})
    assert "hf://" not in model_card(path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"diffusionlm": "0.0.7"}, "It was trained with diffusionlm 0.0.7."),
        ({"family": "llada"}, "Its weights were imported (llada), and not trained with diffusionlm."),
        ({}, None),
    ],
)
def test_a_card_says_who_trained_the_model(source, said, evaluated, tmp_path):
    text = model_card(saved(tmp_path / "model", evaluated["model"], source=source))
    assert ("trained with diffusionlm" in text) == (said is not None)
    assert said is None or said in text.splitlines()


def test_a_fine_tuned_model_is_asked_a_question(evaluated, tmp_path):
    text = model_card(tiny_chat.save(tmp_path / "chat"))
    lines = [line for line in text.splitlines() if "Once upon a time" in line]
    assert '--prompt "Where is my toy?"' in text and 'model.generate("Where is my toy?"' in text
    assert all("--raw" in line or "infill" in line for line in lines)
    assert "my toy" not in model_card(evaluated["model"]) and "--raw" not in model_card(evaluated["model"])


@pytest.mark.parametrize(("packing", "text"), [("examples", "answers"), ("chunk", "text")])
def test_held_out_figures_say_what_they_are_of(packing, text, evaluated, tmp_path):
    cfg = dlm.Config()
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packing=packing))
    saved(tmp_path / "checkpoints" / "7", evaluated["model"], source={"step": 7})
    (tmp_path / "config.json").write_text(config_io.to_json(cfg))
    line = {"step": 7, "eval_nelbo_nats_per_token": 2.5, "eval_nelbo_stderr": 0.1, "eval_bits_per_byte": 1.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert f"On held-out {text}, at step 7: 2.5000 ± 0.1000 nats per token" in model_card(tmp_path)


def test_a_step_that_is_no_number_is_left_out(evaluated, tmp_path):
    saved(tmp_path / "checkpoints" / "7", evaluated["model"], source={"step": "abc"})
    (tmp_path / "config.json").write_text(config_io.to_json(dlm.Config()))
    (tmp_path / "metrics.jsonl").write_text("")
    assert "| Steps |" not in model_card(tmp_path)


def test_the_command_writes_a_new_file(evaluated, tmp_path, capsys):
    output = tmp_path / "README.md"
    assert cli.main(["card", str(evaluated["model"]), "--output", str(output)]) == 0
    assert output.read_text().startswith("---\n") and "No evaluation came with the checkpoint." in output.read_text()
    capsys.readouterr()
    assert cli.main(["card", str(evaluated["model"]), "--output", str(output)]) == 2
    assert "README.md' exists" in capsys.readouterr().err
