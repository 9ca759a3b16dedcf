"""The evaluation of a run on held-out records."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.run_files import checkpoint_steps, truncated_copy
from support.tiny_run import BATCH, LENGTH, STEPS, record, tiny

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.data.pipeline import eval_batches, open_dataset
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.presets import arm_twin
from diffusionlm.training import evaluate, metrics, programs
from diffusionlm.training import loop as trainer
from diffusionlm.training.state import abstract_state


def held_out(dataset):
    """The tokens that a canvas of the model holds, of all held-out records, (N, LENGTH)."""
    there = open_dataset(dataset)
    return there.rows("validation", range(there.size("validation")))["tokens"][:, :LENGTH]


def test_evaluation_scores_each_token_but_the_first_and_the_bytes_it_stands_for(uninterrupted, dataset):
    found = uninterrupted[0].result["eval"]
    there = held_out(dataset)
    scored = there[np.floor(np.arange(3 * BATCH) * (len(there) / (3 * BATCH))).astype(int), 1:]  # spread over the split
    assert found["tokens"] == scored.size
    assert found["bytes"] == (scored < 256).sum()  # 256 is EOS, which is no text
    bits = found["nelbo_nats_per_token"] / math.log(2) * found["tokens"]
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"], rel=1e-12)


def test_evaluation_is_the_mean_over_draws_and_its_error_theirs(uninterrupted, dataset):
    run, _ = uninterrupted
    params = checkpoint.load_params(run.workdir)  # on one device
    step = programs.make_eval_step(run.config)
    token_bytes = open_dataset(dataset).tokenizer.token_bytes().astype(np.float32)
    draws, levels = np.zeros((3, 2)), np.zeros((2, 10))
    for k, rows in enumerate(eval_batches(open_dataset(dataset), batch_size=BATCH, records=3 * BATCH)):
        for draw in range(3):
            part = step(params, rows, token_bytes, np.int32(k), np.int32(draw))
            draws[draw] += float(part["nats"]), float(part["tokens"])
            levels += np.asarray(part["levels"])
    nelbo = draws[:, 0] / draws[:, 1]
    assert len(set(nelbo)) == 3
    found = run.result["eval"]
    assert found["nelbo_nats_per_token"] == pytest.approx(sum(nelbo) / 3, rel=1e-5)
    variance = sum((nelbo - sum(nelbo) / 3) ** 2) / 2
    assert found["nelbo_stderr"] == pytest.approx(math.sqrt(variance / 3), rel=1e-3)
    assert levels[1].all()  # a record with exactly n masks of its 15 tokens, n uniform
    assert found["cross_entropy"] == pytest.approx(levels[0].sum() / levels[1].sum(), rel=1e-5)
    by_level = {name: value for name, value in found.items() if name.startswith("cross_entropy/")}
    names = [f"cross_entropy/{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)]
    assert by_level == pytest.approx(dict(zip(names, levels[0] / levels[1], strict=True)), rel=1e-5)
    last = [line for line in metrics.read(run.workdir) if "eval_tokens" in line][-1]
    assert {f"eval_{name}": found[name] for name in ("cross_entropy", *names)}.items() <= last.items()


def test_where_nothing_can_be_scored_done_json_has_null(uninterrupted, tmp_path, monkeypatch):
    """JSON has no NaN."""
    workdir = truncated_copy(uninterrupted, tmp_path, STEPS)
    summary = evaluate._summary
    monkeypatch.setattr(evaluate, "_summary", lambda sums: summary(0 * sums))
    run = trainer.train(uninterrupted[0].config, workdir)
    for text in [(workdir / "DONE.json").read_text(), *(workdir / "metrics.jsonl").read_text().splitlines()]:
        json.loads(text, parse_constant=pytest.fail)
    written = json.loads((workdir / "DONE.json").read_text())["eval"]
    names = ("nelbo_nats_per_token", "nelbo_stderr", "bits_per_byte")
    assert [written[name] for name in (*names, "tokens")] == [None, None, None, 0]
    for result in (run.result, trainer.train(run.config, workdir).result):  # as the run returns it, and as it is read
        assert all(math.isnan(result["eval"][name]) for name in names) and result["eval"]["tokens"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["segments", "chunk"])
def test_twins_score_the_same_tokens_and_ignorance_costs_log_v(dataset, packing):
    mdm = tiny(dataset, data={"packing": packing})
    arm = dataclasses.replace(mdm, objective="arm", model=arm_twin(mdm.model))
    token_bytes = open_dataset(dataset).tokenizer.token_bytes().astype(np.float32)
    *_, rows = eval_batches(open_dataset(dataset), batch_size=BATCH)  # the last is filled up
    found = {}
    for cfg in (mdm, arm):
        shapes = abstract_state(cfg, make_mesh(cfg.mesh)).params
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        part = programs.make_eval_step(cfg)(zeros, rows, token_bytes, np.int32(4), np.int32(0))
        found[cfg.objective] = float(part["tokens"]), float(part["bytes"])
        assert float(part["nats"]) / float(part["tokens"]) == pytest.approx(math.log(257), rel=1e-6)
    assert found["mdm"] == found["arm"]
    tokens, segments = rows["tokens"][:, :LENGTH], rows["segment_ids"][:, :LENGTH]
    scored = segments[:, 1:] != 0
    if packing == "segments":
        scored &= segments[:, 1:] == segments[:, :-1]
    assert found["mdm"] == (scored.sum(), (scored & (tokens[:, 1:] < 256)).sum())


def test_a_checkpoint_implies_the_evaluation_at_its_step(uninterrupted, tmp_path, monkeypatch):
    workdir = truncated_copy(uninterrupted, tmp_path, 10)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Loop, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        record(uninterrupted[0].config, workdir)
    # It was about to evaluate and to save step 15; had it saved first, no resume would make up for the evaluation.
    assert max(checkpoint_steps(workdir)) == 10
