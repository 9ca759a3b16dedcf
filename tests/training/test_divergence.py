"""Runs whose loss is not finite."""

import math

import jax.numpy as jnp
import pytest
from support import tiny_run
from support.run_files import assert_bit_equal, checkpoint_steps, saved_state
from support.tiny_run import Recorder, record, tiny

from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics
from diffusionlm.training import step as train_step


@pytest.fixture
def own_programs():
    with tiny_run.own_programs():
        yield


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_the_state_before_it(dataset, tmp_path, monkeypatch, own_programs):

    def poisoned(cfg, batch, batch_index):
        full = targets(cfg, batch, batch_index)
        return full.replace(weight_BxT=jnp.where(batch_index == 7, jnp.nan, full.weight_BxT))

    targets = train_step.targets
    monkeypatch.setattr(train_step, "targets", poisoned)
    recorder = Recorder()
    for _ in range(2):  # a second call fails at the same place
        with pytest.raises(trainer.DivergenceError) as caught:
            record(tiny(dataset), tmp_path, recorder=recorder)
        message = str(caught.value)
        assert "step 8 on batch 7 gave loss nan" in message
        assert "saved as step 7" in message and str(tmp_path) in message
        assert max(checkpoint_steps(tmp_path)) == 7
        assert_bit_equal(saved_state(tiny(dataset), tmp_path), recorder.states[7])
        assert [line["step"] for line in metrics.read(tmp_path)] == list(range(1, 8))
    assert not (tmp_path / "DONE.json").exists()


@pytest.mark.slow
def test_a_divergence_right_behind_a_roll_back_says_what_the_checkpoint_lacks(
    dataset, tmp_path, monkeypatch, own_programs
):
    cfg = tiny(dataset, safety={"max_rollbacks": 1})
    monkeypatch.setattr(train_step, "targets", tiny_run.spoil_batches({7: math.nan, 8: math.nan}))
    for _ in range(2):  # it returns to step 5 each time, and fails on the next batch
        with pytest.raises(trainer.DivergenceError) as caught:
            record(cfg, tmp_path)
        message = str(caught.value)
        assert "step 6 on batch 8" in message and "step 5 in" in message and "when batch 5 came next" in message
        assert "the state before it is saved" not in message
        state = saved_state(cfg, tmp_path)
        assert (state[".step"], state[".next_index"], state[".guard.rollbacks"]) == (5, 5, 0)
