"""Fine-tuning from start to end: whose weights a run starts from, that it is told apart, and that runs resume."""

import base64
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_run
from support.tiny_run import BATCH, record, refusal, tiny

from diffusionlm import config, config_io, fingerprint
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data import pipeline, tokenizers
from diffusionlm.data.prepare import prepare
from diffusionlm.errors import UserError
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.presets import arm_twin
from diffusionlm.pretrained.model import load
from diffusionlm.registry import experiment
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics
from diffusionlm.training.start import Start, initial_state, resolve
from diffusionlm.training.state import abstract_state
from diffusionlm.training.stepper import Stepper

LENGTH = 48
SHIPPED = Path(__file__).parents[2] / "docs/results/models"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Sums of two digits, some asked for twice in a dialogue."""
    folder = tmp_path_factory.mktemp("data")
    sums = [(a, b) for a in range(10) for b in range(10)] * 2
    found = []
    for i, (a, b) in enumerate(sums):
        turns = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]
        found.append({"messages": turns * (1 + i % 2)})
    source = folder / "sums.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in found))
    settings = {"tokenizer": "byte", "format": "sft", "template": "plain", "progress": False}
    prepare(str(source), folder / "prepared", sequence_length=LENGTH + 40, validation_fraction=0.2, **settings)
    return folder / "prepared"


def tuned(dataset, **changes):
    """A fine-tuning run of a few steps; `changes` are section -> {field: value}."""
    length = pipeline.open_dataset(dataset).metadata.sequence_length
    cfg = tiny(
        dataset,
        diffusion={"random_length": 0.0, "normalization": "examples"},
        model={"max_length": length},
        data={"packing": "examples", "sequence_length": length},
        run={"steps": 12, "eval_every": 6, "checkpoint_every": 4, "eval_records": 2 * BATCH},
    )
    return tiny_run.with_changes(cfg, changes)


@pytest.fixture(scope="module")
def start(dataset, tmp_path_factory):
    """A model to start from, in bfloat16 and with a context of its own, as released ones are."""
    cfg = tuned(dataset, model={"max_length": 16})
    params = jax.jit(Transformer(cfg.model).init)(jax.random.key(5), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params, is_leaf=lambda x: hasattr(x, "astype"))
    params = jax.tree.map(lambda x: getattr(x, "value", x), params, is_leaf=lambda x: hasattr(x, "value"))
    path = tmp_path_factory.mktemp("start") / "model"
    checkpoint.save_params(path, params, sidecar_of(cfg, dataset))
    return path, jax.device_get(params)


def sidecar_of(cfg, dataset, **changes):
    values = {
        "objective": cfg.objective,
        "model": config_io.to_dict(cfg.model),
        "diffusion": config_io.to_dict(cfg.diffusion),
        "mask_id": cfg.mask_id,
        "tokenizer": pipeline.open_dataset(dataset).metadata.tokenizer,
        "source": {"experiment": "base", "step": 7},
    }
    return Sidecar(**values | changes)


def identity(path):
    return Start(checkpoint.find(path)).identity


def words_model(folder):
    """A SentencePiece model of its own."""
    trained = tokenizers.train_sentencepiece(["some words and others " * 9] * 20, 275)
    path = folder / "words.model"
    path.write_bytes(base64.b64decode(trained.to_dict()["model"]))
    return path


@pytest.fixture(scope="module")
def run(dataset, start, tmp_path_factory):
    """A fine-tuning run from start to end; tests must not change its directory."""
    return record(tuned(dataset, run={"init_from": str(start[0])}), tmp_path_factory.mktemp("run"))


# --- the start


def test_a_run_starts_from_the_weights_in_float32(run, start):
    given = tiny_run.leaves({"params": start[1]})
    before = {name: value for name, value in run[1].states[0].items() if name.startswith(".params")}
    assert len(given) == len(before) > 5
    for (_, value), found in zip(sorted(given.items()), (before[name] for name in sorted(before)), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.asarray(value, np.float32))
    moments = [value for name, value in run[1].states[0].items() if ".opt_state" in name]
    assert not any(value.any() for value in moments)


def test_parameters_lie_on_the_mesh_of_the_run(dataset, start):
    cfg = tuned(dataset, run={"init_from": str(start[0])})
    cfg, resolved = resolve(cfg, Path("nowhere"))
    mesh = make_mesh(config.MeshConfig(2, 2, 2))
    opened = pipeline.open_dataset(dataset)
    with jax.set_mesh(mesh):
        state = initial_state(cfg, resolved, opened, mesh)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract_state(cfg, mesh)), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))


def test_the_start_is_part_of_the_science_wherever_it_lies(run, dataset, start, tmp_path):
    found = run[0].config.run.init_id
    assert found.startswith("base@7-") and found == identity(start[0])
    assert fingerprint.fingerprint(run[0].config) != fingerprint.fingerprint(tuned(dataset))
    shutil.copytree(start[0], tmp_path / "moved")
    moved = tuned(dataset, run={"init_from": str(tmp_path / "moved")})
    moved, _ = resolve(moved, tmp_path)
    assert fingerprint.fingerprint(moved) == fingerprint.fingerprint(run[0].config)
    assert checkpoint.load_sidecar(run[0].workdir).source["init_id"] == found
    assert json.loads((run[0].workdir / "config.json").read_text())["run"]["init_id"] == found


def test_another_start_is_another_run(run, dataset, tmp_path, start):
    other = tmp_path / "other"
    checkpoint.save_params(
        other, start[1], sidecar_of(tuned(dataset), dataset, source={"experiment": "base", "step": 8})
    )
    message = refusal(tuned(dataset, run={"init_from": str(other)}), run[0].workdir)
    assert "run.init_id (base@7-" in message and "base@8-" in message
    assert message.endswith(f"with --run.init_from {start[0]}")
    assert "run.init_id (base@7-" in refusal(tuned(dataset), run[0].workdir)
    plain = tuned(dataset, run={"steps": 1, "eval_every": 0}, optim={"warmup_steps": 0})
    trainer.train(plain, tmp_path / "plain")
    started = tiny_run.with_changes(plain, {"run": {"init_from": str(start[0])}})
    assert refusal(started, tmp_path / "plain").endswith("with no --run.init_from")
    named = tuned(dataset, run={"init_from": str(other), "init_id": run[0].config.run.init_id})
    assert "is base@8-" in refusal(named, tmp_path / "run") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"d_ff": 64}}, "holds another model: model.d_ff (32 there, 64 here)"),
        ({"model": {"rope_theta": 5e5}}, "model.rope_theta (10000.0 there, 500000.0 here)"),
        ({"model": {"mask_row": False}, "diffusion": {"mask_id": 5}}, "model.mask_row (True there, False here)"),
    ],
)
def test_another_model_is_refused(changes, said, dataset, start, tmp_path):
    cfg = tuned(dataset, run={"init_from": str(start[0])}, **changes)
    assert said in refusal(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_mask_token_tokenizer_or_objective_is_refused(dataset, start, tmp_path):
    cfg = tuned(dataset)
    kept = {"mask_row": False}
    inside = tiny_run.with_changes(cfg, {"model": kept, "diffusion": {"mask_id": 5}})
    tokenizer = {"kind": "byte", "sha256": "f" * 64}
    twin = dataclasses.replace(cfg, objective="arm", model=arm_twin(cfg.model))
    for name, ours, theirs, said in (
        ("mask", inside, sidecar_of(inside, dataset, mask_id=6), "masks with id 6, this run with 5"),
        ("tokenizer", cfg, sidecar_of(cfg, dataset, tokenizer=tokenizer), "data prepare --tokenizer"),
        ("objective", twin, sidecar_of(cfg, dataset), "model.causal (False there, True here)"),
        ("shifted", cfg, sidecar_of(cfg, dataset, alignment="shifted"), "predicts with alignment 'shifted'"),
        (
            "suppressed",
            inside,
            sidecar_of(inside, dataset, suppressed_ids=()),
            "never predicts the ids [], this run [5]; set --diffusion.suppress_mask False",
        ),
        ("nameless", cfg, sidecar_of(cfg, dataset, source={}), "does not say what it is (its sidecar has an empty"),
    ):
        checkpoint.save_params(tmp_path / name, start[1], theirs)
        ours = tiny_run.with_changes(ours, {"run": {"init_from": str(tmp_path / name)}})
        assert said in refusal(ours, tmp_path / f"{name} run")
        assert not (tmp_path / f"{name} run").exists() or name == "tokenizer"


def test_the_identity_tells_what_the_parameters_are(dataset, start, tmp_path):
    """Other numbers, another dtype or another alignment under the same names are another start; a copy is none."""
    cfg, found = tuned(dataset), {}
    for name, scale, dtype, changes in (
        ("same", 1, jnp.bfloat16, {}),
        ("other", 2, jnp.bfloat16, {}),
        ("wide", 1, jnp.float32, {}),
        ("shifted", 1, jnp.bfloat16, {"alignment": "shifted"}),
    ):
        params = jax.tree.map(lambda x, scale=scale, dtype=dtype: (jnp.asarray(x) * scale).astype(dtype), start[1])
        checkpoint.save_params(tmp_path / name, params, sidecar_of(cfg, dataset, **changes))
        found[name] = identity(tmp_path / name)
    assert len(set(found.values())) == len(found)
    shutil.copytree(tmp_path / "same", tmp_path / "copy")
    assert identity(tmp_path / "copy") == found["same"]


def test_a_directory_s_newest_step_is_looked_up_once(dataset, start, tmp_path, monkeypatch):
    """It may be training still: the step that was found first is checked, loaded, and kept when the run goes on."""
    base, workdir = tmp_path / "base", tmp_path / "run"
    settings = {"init_from": str(base), "steps": 2, "eval_every": 0, "checkpoint_every": 1}
    cfg = tuned(dataset, run=settings, optim={"warmup_steps": 0})
    for step in (7, 8):
        source = {"experiment": "base", "step": step}
        checkpoint.save_params(tmp_path / str(step), start[1], sidecar_of(cfg, dataset, source=source))
    (base / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "7", base / "checkpoints" / "7")
    opened = trainer.open_or_prepare

    def grows(*args):
        shutil.copytree(tmp_path / "8", base / "checkpoints" / "8")
        return opened(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "open_or_prepare", grows)
        patch.setattr(trainer.Loop, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(cfg, workdir)
    assert json.loads((workdir / "config.json").read_text())["run"]["init_from"] == str(base / "checkpoints" / "7")
    assert trainer.train(cfg, workdir).config.run.init_id.startswith("base@7-")
    named = tiny_run.with_changes(cfg, {"run": {"init_from": str(base / "checkpoints" / "8")}})
    assert "base@8-" in refusal(named, workdir)


def sums(folder, *, tokenizer="sentencepiece", **run):
    """A run of one step that prepares its own data."""
    found = [{"question": f"{i}+{i}?", "answer": f"{2 * i}."} for i in range(400)]
    (folder / "sums.json").write_text(json.dumps(found))
    changes = {"path": "", "source": str(folder / "sums.json"), "tokenizer": tokenizer}
    return changes, {"steps": 1, "eval_every": 0} | run


def test_the_tokenizer_of_the_start_prepares_the_data(dataset, start, tmp_path):
    """It is the default, another is refused before anything is prepared, and a begun run needs neither again."""
    gone = tmp_path / "gone"
    shutil.copytree(start[0], gone)
    data, run = sums(tmp_path, init_from=str(gone))
    cfg = tuned(dataset, data=data, run=run, optim={"warmup_steps": 0})
    other = tiny_run.with_changes(cfg, {"data": {"tokenizer": str(words_model(tmp_path))}})
    message = refusal(other, tmp_path / "wrong")
    assert "has another tokenizer" in message and message.endswith("leave --data.tokenizer out")
    bigger = tiny_run.with_changes(cfg, {"model": {"d_ff": 64}})
    assert "model.d_ff (32 there, 64 here)" in refusal(bigger, tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "data").exists()
    for name, tokenizer in (("default", "sentencepiece"), ("named", str(gone))):
        ours = tiny_run.with_changes(cfg, {"data": {"tokenizer": tokenizer}})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.Loop, "finish", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trainer.train(ours, tmp_path / name)
        made = pipeline.open_dataset(tmp_path / name / "data").metadata
        assert made.tokenizer == pipeline.open_dataset(dataset).metadata.tokenizer
    moved = tmp_path / "moved"
    gone.rename(moved)
    (tmp_path / "sums.json").unlink()
    assert trainer.train(cfg, tmp_path / "default").done
    assert trainer.train(tiny_run.with_changes(cfg, {"data": {"tokenizer": str(gone)}}), tmp_path / "named").done


def test_the_start_is_read_once(dataset, start, tmp_path, monkeypatch):
    """It is looked up and read once, though the data are prepared with its tokenizer, and hashed again when loaded."""
    reads = {"find": 0, "load_sidecar": 0, "params_sha256": 0, "load_params": 0}

    def counting(name):
        original = getattr(checkpoint, name)

        def call(path, *args, **named):
            reads[name] += Path(path) == Path(start[0])
            return original(path, *args, **named)

        return call

    for name in reads:
        monkeypatch.setattr(checkpoint, name, counting(name))
    data, run = sums(tmp_path, init_from=str(start[0]))
    assert trainer.train(tuned(dataset, data=data, run=run, optim={"warmup_steps": 0}), tmp_path / "run").done
    # Every reader looks whether the checkpoint is whole.
    assert reads == {"find": 5, "load_sidecar": 1, "params_sha256": 2, "load_params": 1}


def test_where_a_tokenizer_s_checkpoint_lies_is_not_science(dataset):
    def named(tokenizer):
        return fingerprint.fingerprint(tuned(dataset, data={"tokenizer": tokenizer}))

    assert named("runs/a") == named("/elsewhere/b") != named("byte")
    assert named("a/tokenizer.model") != named("b/tokenizer.model")


def test_what_cannot_be_prepared_is_told_in_options_of_train(dataset, start, tmp_path):
    data, run = sums(tmp_path, init_from=str(start[0]))
    short = tuned(dataset, data=data | {"sequence_length": 4}, run=run, optim={"warmup_steps": 0})
    message = refusal(short, tmp_path / "run")
    assert "answers end beyond 4 tokens" in message and "--data.path" in message


def test_there_must_be_a_checkpoint(dataset, tmp_path):
    for path in (tmp_path / "absent", dataset):
        assert "run.init_from: " in refusal(tuned(dataset, run={"init_from": str(path)}), tmp_path / "run")
    assert "needs run.init_from" in refusal(tuned(dataset, run={"init_id": "base@7-0"}), tmp_path / "run")


def test_texts_and_dialogues_are_not_taken_for_each_other(dataset, tmp_path):
    texts = tiny_run.make_dataset(tmp_path)
    there = {"model": {"max_length": 16}, "data": {"path": str(texts), "sequence_length": 16}}
    assert "holds texts, which does not suit data.packing=examples" in refusal(
        tuned(dataset, **{**there, "data": there["data"] | {"packing": "examples"}}), tmp_path / "run"
    )
    message = refusal(tuned(dataset, data={"packing": "chunk"}), tmp_path / "run")
    assert "holds prompts with answers" in message and "--data.packing examples" in message


def test_random_weights_are_fine_tuned_with_a_warning(dataset, tmp_path, caplog):
    trainer.train(tuned(dataset, run={"steps": 1, "eval_every": 0}, optim={"warmup_steps": 0}), tmp_path)
    assert "fine-tuning random weights" in caplog.text


# --- the run


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


def test_before_its_first_checkpoint_a_run_still_needs_its_start(dataset, start, tmp_path):
    workdir, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(start[0], gone)
    cfg = tuned(dataset, run={"init_from": str(gone)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "dispatch", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(cfg, workdir)
    shutil.rmtree(gone)
    assert "run.init_from: no checkpoint at" in refusal(cfg, workdir)
    checkpoint.save_params(gone, start[1], sidecar_of(cfg, dataset, source={"experiment": "another"}))
    assert "is now another@0-" in refusal(cfg, workdir)


def test_a_start_that_is_replaced_while_data_are_prepared_is_refused(dataset, start, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(start[0], path)
    cfg, resolved = resolve(tuned(dataset, run={"init_from": str(path)}), tmp_path / "run")
    shutil.rmtree(path)
    other = jax.tree.map(lambda x: x + 1, start[1])
    checkpoint.save_params(path, other, sidecar_of(tuned(dataset, model={"max_length": 16}), dataset))
    with pytest.raises(UserError, match="is now base@7-.*was started with base@7-.*restore that checkpoint"):
        initial_state(cfg, resolved, pipeline.open_dataset(dataset), make_mesh(cfg.mesh))


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


def test_every_batch_is_about_single_answers(run, dataset):
    seen = set()
    for inputs in run[1].inputs.values():
        parts = next(value for name, value in inputs.items() if name.endswith("['segment_ids']"))
        assert set(np.unique(parts)) == {0, 1, 2}
        seen |= set((parts == 1).sum(1).tolist())
    assert len({n > LENGTH for n in seen}) == 2  # first answers, and second ones with a history


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


# --- the models in this repository


@pytest.mark.parametrize("name", ["tinystories", pytest.param("tinystories_arm", marks=pytest.mark.slow)])
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
