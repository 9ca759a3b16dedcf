"""Cards say what the files of a run say, in a form that the Hub reads."""

import json

import pytest
from support.tiny_checkpoint import save

import diffusionlm as dlm
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
    repocard = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    text = model_card(evaluated["model"], name="me/model", evaluations=[evaluated["result"]], license="apache-2.0")
    data = repocard.ModelCard(text).data
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


def test_the_command_writes_a_new_file(evaluated, tmp_path, capsys):
    output = tmp_path / "README.md"
    assert cli.main(["card", str(evaluated["model"]), "--output", str(output)]) == 0
    assert output.read_text().startswith("---\n") and "No evaluation came with the checkpoint." in output.read_text()
    capsys.readouterr()
    assert cli.main(["card", str(evaluated["model"]), "--output", str(output)]) == 2
    assert "README.md' exists" in capsys.readouterr().err
