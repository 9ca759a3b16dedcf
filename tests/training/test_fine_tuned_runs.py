"""Fine-tuning from start to end: what is learnt, that runs resume, and what the checkpoint says."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.fine_tuning import LENGTH, make_dialogues, tuned
from support.tiny_run import BATCH, leaves, record, refusal

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.data import pipeline
from diffusionlm.model import lora
from diffusionlm.pretrained.loading import load
from diffusionlm.registry import experiment
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics

SHIPPED = Path(__file__).parents[2] / "docs/results/models"


@pytest.fixture(scope="module")
def dataset(fine_tuned):
    return fine_tuned.dataset


@pytest.fixture(scope="module")
def start(fine_tuned):
    return fine_tuned.start


@pytest.fixture(scope="module")
def run(fine_tuned):
    return fine_tuned.run


@pytest.mark.slow
def test_random_weights_are_fine_tuned_with_a_warning(dataset, tmp_path, caplog):
    trainer.train(tuned(dataset, run={"steps": 1, "eval_every": 0}, optim={"warmup_steps": 0}), tmp_path)
    assert "fine-tuning random weights" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_needs_no_start_and_repeats_bit_for_bit(run, dataset, start, tmp_path):
    workdir, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(start[0], gone)
    cfg = tuned(dataset, run={"init_from": str(gone)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Loop, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(cfg, workdir)
    for step in (8, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    shutil.rmtree(gone)
    resumed, recorder = record(cfg, workdir)
    assert list(recorder.states) == list(range(4, 12))
    for k in recorder.states:
        for name, value in run[1].states[k].items():
            assert recorder.states[k][name].tobytes() == value.tobytes(), name
        for name, value in run[1].inputs[k].items():
            assert np.asarray(recorder.inputs[k][name]).tobytes() == np.asarray(value).tobytes(), name
    assert resumed.result["eval"] == run[0].result["eval"]
    assert resumed.config == dataclasses.replace(
        run[0].config, run=dataclasses.replace(run[0].config.run, init_from=str(gone))
    )


@pytest.mark.slow
def test_held_out_answers_are_scored_by_the_answer_token(run, dataset):
    opened = pipeline.open_dataset(dataset)
    rows = list(pipeline.eval_batches(opened, batch_size=BATCH, records=2 * BATCH))
    scored = np.concatenate([row["segment_ids"] == 2 for row in rows])
    tokens = np.concatenate([row["tokens"] for row in rows])
    found = run[0].result["eval"]
    assert found["tokens"] == scored.sum() and found["bytes"] == (scored & (tokens < 256)).sum()
    assert found["bits_per_byte"] == pytest.approx(
        found["nelbo_nats_per_token"] * found["tokens"] / found["bytes"] / np.log(2)
    )
    assert [line["step"] for line in metrics.read(run[0].workdir) if "eval_tokens" in line] == [6, 12]


@pytest.mark.slow
def test_every_batch_is_about_single_answers(run, dataset):
    seen = set()
    for inputs in run[1].inputs.values():
        parts = next(value for name, value in inputs.items() if name.endswith("['segment_ids']"))
        assert set(np.unique(parts)) == {0, 1, 2}
        seen |= set((parts == 1).sum(1).tolist())
    assert len({n > LENGTH for n in seen}) == 2  # first answers, and second ones with a history


@pytest.mark.slow
def test_the_checkpoint_is_asked_as_it_was_trained(run, dataset):
    model = load(run[0].workdir)
    assert model.template.to_dict() == pipeline.open_dataset(dataset).metadata.template
    row = pipeline.open_dataset(dataset).rows("train", [0])
    prompt = row["tokens"][0][row["segment_ids"][0] == 1].tolist()
    assert model.encode_messages([initial_message(prompt, model)]) == prompt
    assert model.sidecar.canvas["start_id"] == prompt[0]
    assert model.generate("1+1", length=4)[0].templated


def initial_message(prompt, model):
    from diffusionlm.data.chat_templates import Message

    text = model.tokenizer.decode(prompt)
    return Message("user", text.removeprefix("### user\n").removesuffix("\n\n### assistant\n"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return the dialogues of `dataset`, several to a record."""
    return make_dialogues(tmp_path_factory.mktemp("packed"), pack=True)


@pytest.mark.slow
def test_packed_records_need_their_own_setting(dataset, packed, tmp_path):
    cfg = tuned(packed)
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packing="examples"))
    assert "several prompts with answers in each record" in refusal(other, tmp_path / "a")
    assert "set --data.packing packed_examples" in refusal(other, tmp_path / "a")
    length = pipeline.open_dataset(dataset).metadata.sequence_length
    data = dataclasses.replace(cfg.data, path=str(dataset), sequence_length=length)
    assert "set --data.packing examples" in refusal(dataclasses.replace(cfg, data=data), tmp_path / "b")


@pytest.mark.slow
def test_adapters_are_tuned_on_packed_examples_with_prompts_left_out(packed, start, tmp_path):
    """All at once: nothing but adapters and the embedding moves, and a resumed run repeats bit for bit."""
    changes = {
        "model": {"lora_rank": 2},
        "diffusion": {"prompt_dropout": 0.3},
        "run": {"init_from": str(start[0]), "eval_every": 0, "eval_records": BATCH},
    }
    run, recorder = record(tuned(packed, **changes), tmp_path / "run")
    first, last = recorder.states[0], recorder.states[11]
    moved = {name for name in first if name.startswith(".params") and (first[name] != last[name]).any()}
    assert all(lora.UP in name or lora.DOWN in name or "'embed'" in name for name in moved)
    assert len(moved) == 7 * 2 + 1
    masked_prompts = 0
    for inputs in recorder.inputs.values():
        ids = next(value for name, value in inputs.items() if name.endswith("['segment_ids']"))[:, :-1]
        seen = next(value for name, value in inputs.items() if name.endswith("inputs_BxT"))
        masked_prompts += ((ids % 4 == 1) & (seen == 257)).sum()
        assert ids.max() > 4  # several examples in a row
    assert masked_prompts
    for step in (8, 12):
        shutil.rmtree(run.workdir / "checkpoints" / str(step))
    (run.workdir / "DONE.json").unlink()
    again, resumed = record(tuned(packed, **changes), tmp_path / "run")
    assert list(resumed.states) == list(range(4, 12))
    for k, state in resumed.states.items():
        for name, value in state.items():
            assert value.tobytes() == recorder.states[k][name].tobytes(), name
    assert again.result["eval"] == run.result["eval"]
    params = checkpoint.load_params(run.workdir)
    assert any(leaf.any() for name, leaf in leaves(params).items() if lora.UP in name)


RECIPES = ("smdm_reverse", "smdm_gsm8k", "smdm_sharegpt", "diffugpt_gsm8k", "tinystories_chat")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_a_step_with_a_tiny_model(name, dataset, packed, tmp_path):
    cfg = experiment(name)
    path = packed if cfg.data.packing == "packed_examples" else dataset
    length = pipeline.open_dataset(path).metadata.sequence_length
    tiny = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_ff": 32, "vocab_size": 257}
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, max_length=length, dtype="float32", remat="none", **tiny),
        optim=dataclasses.replace(cfg.optim, warmup_steps=0),
        data=dataclasses.replace(cfg.data, path=str(path), sequence_length=length, batch_size=8),
        run=dataclasses.replace(cfg.run, steps=1, eval_every=0, eval_records=8),
    )
    run = trainer.train(cfg, tmp_path)
    found = run.result["eval"]
    assert 3 < found["nelbo_nats_per_token"] < 9  # near log 257, of random weights
    assert found["cross_entropy"] == pytest.approx(np.log(257), abs=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tinystories", "tinystories_arm"])
def test_the_shipped_models_can_be_fine_tuned(name, tmp_path):
    found = [{"question": f"Where is toy {i}?", "answer": f"In box {i}."} for i in range(400)]
    (tmp_path / "toys.json").write_text(json.dumps(found))
    settings = {
        "data.source": str(tmp_path / "toys.json"),
        "run.init_from": str(SHIPPED / name),
        "data.batch_size": 8,
        "run.steps": 1,
        "optim.warmup_steps": 0,
        "run.eval_every": 0,
    }
    cfg = experiment(name.replace("stories", "stories_sft"), settings)
    run = trainer.train(cfg, tmp_path / "run")
    assert run.done and run.result["eval"]["nelbo_nats_per_token"] < np.log(2047) - 1
    assert run.config.run.init_id.startswith(f"{name}@8000-")
