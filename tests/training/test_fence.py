"""A run directory has one owner, from before anything is written until everything is."""

import json
import os
import re

import pytest
from support.run_files import content
from support.tiny_run import STEPS, Recorder, refusal, tiny

from diffusionlm.errors import UserError
from diffusionlm.ownership import claims
from diffusionlm.ownership.lease import LeaseLost
from diffusionlm.training import fence as fences
from diffusionlm.training import loop as trainer


def test_a_second_run_is_refused_before_it_writes_anything(dataset, tmp_path):
    with fences.owned_run(tmp_path, None):
        before = content(tmp_path)
        message = refusal(tiny(dataset), tmp_path)
        assert content(tmp_path) == before
    assert message.startswith(f"the run directory {tmp_path} is in use by process {os.getpid()} on ")
    assert "use another --workdir" in message
    assert content(tmp_path) == {}, "its owner leaves nothing"


def test_a_run_that_its_owner_finished_meanwhile_is_returned(dataset, tmp_path, monkeypatch):
    owned = claims.owned

    def finish_first(*args, **options):
        evaluation = {"nelbo_nats_per_token": 1.0, "nelbo_stderr": 0.1, "nelbo_per_draw": [1.0], "bits_per_byte": 2.0}
        done = {"step": STEPS, "tokens": 48, "flops": 1, "train_loss": 1.0, "eval": evaluation, "seconds": 1}
        done["goodput"] = 1
        (tmp_path / "DONE.json").write_text(json.dumps(done))
        return owned(*args, **options)

    monkeypatch.setattr(claims, "owned", finish_first)
    monkeypatch.setattr(trainer, "open_or_prepare", None)
    assert trainer.train(tiny(dataset), tmp_path).step == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("deleted", [False, True])
def test_a_run_whose_directory_is_taken_over_stops_before_the_next_checkpoint(dataset, tmp_path, monkeypatch, deleted):
    def take(index):
        place = tmp_path / claims.FILE
        owner = json.loads(place.read_text())
        place.unlink()
        if index == 2 and not deleted:
            place.write_text(json.dumps(owner | {"token": "another", "holder": "pod-7:12"}))

    monkeypatch.setattr(trainer, "make_train_step", Recorder(lambda index: take(index) if index == 2 else None))
    message = refusal(tiny(dataset), tmp_path)
    by = "another process, or its lease deleted" if deleted else "pod-7:12"
    assert message == f"the run directory {tmp_path} was taken over by {by}; this process writes no more there"
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert (tmp_path / claims.FILE).exists() != deleted


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(f"workdir={tmp_path}/file must be a directory")):
        with fences.owned_run(tmp_path / "file", None):
            pass


class Worker:
    """The fence of a worker of a sweep."""

    def __init__(self):
        self.known = self.taken = False

    def check(self):
        if self.known:
            raise LeaseLost("the cell was taken over")

    def confirm(self):
        self.known = self.taken
        self.check()


def test_workers_of_a_sweep_succeed_each_other_and_each_learns_it_from_its_own_lease(tmp_path):
    """The lease of the cell, not that of the directory, says which worker has the run."""
    first, second = Worker(), Worker()
    with fences.owned_run(tmp_path, first) as before:
        before.confirm()
        with pytest.raises(UserError, match="in use"), fences.owned_run(tmp_path, None):
            pass
        with fences.owned_run(tmp_path, second) as after:
            first.taken = True
            after.confirm()
            for use in (before.confirm, before.check):
                with pytest.raises(LeaseLost, match="the cell was taken over"):
                    use()
            after.confirm()
            after.check()


def test_a_fence_that_learns_of_a_loss_asks_those_before_it():
    class Lost(Worker):
        def check(self):
            raise LeaseLost("the directory was taken over")

    worker = Worker()
    with pytest.raises(LeaseLost, match="the directory"):
        fences.Fences(worker, Lost()).check()
    assert not worker.known
    worker.taken = True
    with pytest.raises(LeaseLost, match="the cell"):
        fences.Fences(worker, Lost()).check()
    assert worker.known
