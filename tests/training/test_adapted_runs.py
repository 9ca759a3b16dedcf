"""Runs that start from an autoregressive model: weights, adapters, what the checkpoint says, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_run
from support.random_params import make_params
from support.tiny_run import LENGTH, record, refusal, tiny

from diffusionlm import config, config_io, fingerprint
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data import pipeline, tokenizers
from diffusionlm.data.prepare import prepare
from diffusionlm.errors import UserError
from diffusionlm.model import lora
from diffusionlm.model.transformer import Transformer
from diffusionlm.presets import arm_twin
from diffusionlm.pretrained.loading import load
from diffusionlm.training import loop as trainer
from diffusionlm.training.start import resolve
from diffusionlm.training.stepper import Stepper

VOCAB = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"a cat saw {i} dogs, and ran {i + 1} times."}) + "\n" for i in range(300))
    )
    return path


@pytest.fixture(scope="module")
def start(source, tmp_path_factory):
    """An autoregressive model with BOS before its documents, and fewer pieces than rows."""
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    tokenizer = tokenizers.train_sentencepiece(texts, 290)
    model = arm_twin(dataclasses.replace(tiny("nowhere").model, vocab_size=VOCAB))
    params = make_params(model, sharpness=1)
    sidecar = Sidecar(
        objective="arm",
        model=config_io.to_dict(model),
        diffusion=config_io.to_dict(config.DiffusionConfig()),
        mask_id=None,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        alignment="shifted",
        tokenizer=tokenizer.to_dict(),
        canvas={"max_length": LENGTH, "start_id": tokenizer.bos_id},
        source={"experiment": "llama", "step": 0},
    )
    path = tmp_path_factory.mktemp("start") / "model"
    checkpoint.save_params(path, params, sidecar)
    return path, jax.device_get(params), tokenizer


def adapting(start, source, **changes):
    cfg = tiny(
        "",
        model={"vocab_size": VOCAB},
        diffusion={"alignment": "shifted", "anneal_steps": 3, "random_length": 0.0},
        data={"path": "", "source": str(source)},
        run={"init_from": str(start), "steps": 5, "eval_every": 0},
        optim={"warmup_steps": 0},
    )
    return tiny_run.with_changes(cfg, changes)


@pytest.fixture(scope="module")
def run(start, source, tmp_path_factory):
    """With adapters, of a diffusion model that opens up."""
    return record(adapting(start[0], source, model={"lora_rank": 2}), tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_it_begins_with_all_weights_and_a_mean_row_for_the_mask(run, start):
    before = run[1].states[0]
    given = start[1]
    embed = before[".params['embed']"]
    np.testing.assert_array_equal(embed[:VOCAB], given["embed"][:VOCAB])
    np.testing.assert_allclose(embed[VOCAB], given["embed"][:VOCAB].mean(0), atol=1e-6)
    np.testing.assert_array_equal(before[".params['head']"][:, :VOCAB], given["head"][:, :VOCAB])
    for name, value in tiny_run.leaves({"blocks": given["blocks"]}).items():
        np.testing.assert_array_equal(before[f".params{name}"], value)
    ups = [value for name, value in before.items() if name.startswith(".params") and lora.UP in name]
    downs = [value for name, value in before.items() if name.startswith(".params") and lora.DOWN in name]
    assert len(ups) == len(downs) == 7 and not any(up.any() for up in ups) and all(down.any() for down in downs)


@pytest.mark.slow
def test_the_checkpoint_says_what_the_model_predicts_and_how_texts_begin(run, start):
    sidecar = checkpoint.load_sidecar(run[0].workdir)
    tokenizer = start[2]
    assert (sidecar.objective, sidecar.alignment, sidecar.mask_id) == ("mdm", "shifted", VOCAB)
    assert sidecar.canvas["start_id"] == tokenizer.bos_id != tokenizer.eos_id
    assert sidecar.source["init_id"].startswith("llama@0-")
    metadata = pipeline.open_dataset(run[0].workdir / "data").metadata
    assert metadata.bos and metadata.vocab_size == 290
    found = load(run[0].workdir)
    assert found.config.shifted and found.encode("a cat")[0] == tokenizer.bos_id
    (text,) = found.generate("a cat", length=5, steps=5, seed=1)
    assert len(text.tokens) == 5 and max(text.tokens) < VOCAB


@pytest.mark.slow
def test_every_document_begins_with_bos_and_ends_with_eos(run, source, start):
    tokenizer = start[2]
    dataset = pipeline.open_dataset(run[0].workdir / "data")
    tokens = dataset.rows("train", range(dataset.size("train")))["tokens"].reshape(-1).tolist()
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    documents = {(tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id) for text in texts}
    starts = [i for i, token in enumerate(tokens) if token == tokenizer.bos_id]
    assert starts[0] == 0 and len(starts) > 100
    for first, after in zip(starts, starts[1:], strict=False):
        assert tuple(tokens[first:after]) in documents


@pytest.mark.slow
def test_a_sampler_has_adapters_in_its_weights(run):
    params = checkpoint.load_params(run[0].workdir)
    model = run[0].config.model
    found = load(run[0].workdir)
    assert found.config.model == dataclasses.replace(model, lora_rank=0)
    assert any(leaf.any() for name, leaf in tiny_run.leaves(params).items() if lora.UP in name)
    tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH) % VOCAB
    with_adapters = jax.jit(Transformer(model).apply)({"params": params}, tokens)
    merged = jax.jit(Transformer(found.config.model).apply)({"params": found.params}, tokens)
    np.testing.assert_allclose(with_adapters, merged, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_starts_from_adapters_has_them_in_its_weights(run, source, tmp_path):
    """And adapters of its own, if it wants any, are new."""
    merged = jax.device_get(load(run[0].workdir).params)
    for rank in (0, 3):
        cfg = adapting(
            run[0].workdir, source, model={"lora_rank": rank}, diffusion={"anneal_steps": 0}, run={"steps": 1}
        )
        begun = record(cfg, tmp_path / str(rank))[1].states[0]
        for name, value in tiny_run.leaves(merged).items():
            np.testing.assert_allclose(begun[f".params{name}"], value, atol=1e-6)
        ups = [value for name, value in begun.items() if name.startswith(".params") and lora.UP in name]
        assert len(ups) == (7 if rank else 0) and not any(up.any() for up in ups)


@pytest.mark.slow
def test_without_the_shift_it_warns_once(start, source, tmp_path, caplog):
    trainer.train(
        adapting(start[0], source, diffusion={"alignment": "same", "anneal_steps": 0}, run={"steps": 1}), tmp_path
    )
    assert caplog.text.count("diffusion.alignment=same unlearns that") == 1
    assert checkpoint.load_sidecar(tmp_path).alignment == "same"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"d_ff": 64}}, "holds another model: model.d_ff (32 there, 64 here)"),
        ({"model": {"vocab_size": 290}}, "model.vocab_size (300 there, 290 here)"),
    ],
)
def test_another_model_is_refused(changes, said, start, source, tmp_path):
    assert said in refusal(adapting(start[0], source, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_without_a_start_it_says_so(source, tmp_path, caplog):
    cfg = adapting("", source, run={"steps": 1}, diffusion={"anneal_steps": 0})
    assert "model.lora_rank=2 trains adapters of a model that is frozen" in refusal(
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, lora_rank=2)), tmp_path / "run"
    )
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "dispatch", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(cfg, tmp_path / "random")
    assert caplog.text.count("adapting random weights: give an autoregressive model with --run.init_from") == 1


@pytest.mark.slow
def test_a_shifted_model_goes_on_shifted(run, source, tmp_path):
    cfg = adapting(run[0].workdir, source, diffusion={"alignment": "same"}, model={"lora_rank": 0})
    assert "set --diffusion.alignment shifted" in refusal(cfg, tmp_path / "run")


def test_adapters_are_no_other_start(start, source):
    """A run's identity is the base it started from and its own rank."""
    plain, adapters = (
        resolve(cfg, checkpoint.absolute("nowhere"))[0]
        for cfg in (adapting(start[0], source, model={"lora_rank": rank}) for rank in (0, 2))
    )
    assert plain.run.init_id == adapters.run.init_id
    assert fingerprint.fingerprint(plain) != fingerprint.fingerprint(adapters)


def test_bos_needs_a_tokenizer_that_has_it(source, tmp_path):
    with pytest.raises(UserError, match="bos=True needs a tokenizer with a BOS piece, which byte has not"):
        prepare(str(source), tmp_path / "out", sequence_length=8, tokenizer="byte", bos=True, progress=False)
