"""Workers on a sweep whose training is a stand-in: claims, failures, signals and refusals."""

import math
import os
import re
import signal
from dataclasses import replace

import pytest
from support import tiny_sweep
from support.tiny_sweep import settings, stub_train

from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.scaling.sweep import status, worker
from diffusionlm.scaling.sweep.lease import Leases
from diffusionlm.scaling.sweep.recipe import grid
from diffusionlm.training import loop as trainer

pytestmark = pytest.mark.usefixtures("one_device", "stubbed")


def test_a_failed_cell_is_recorded_and_the_others_run(dataset, sweep, tmp_path, monkeypatch):
    seeds = []

    def fail(cfg, workdir, **options):
        seeds.append(cfg.run.seed)
        if cfg.run.seed == 1:
            raise MemoryError("no room\nat all")
        return stub_train(cfg, workdir, **options)

    monkeypatch.setattr(trainer, "train", fail)
    first = worker.run(sweep, tmp_path, settings(dataset))
    bad = sweep.select()[1].id
    assert first.failed == (bad,) and len(first.done) == 2
    cells = status.status(sweep, tmp_path).cells
    assert [cell.state for cell in cells] == ["done", "failed", "done"]
    assert cells[1].note == "MemoryError: no room at all"
    assert worker.run(sweep, tmp_path, settings(dataset)).failed == (bad,), "it is not begun again unasked"
    assert seeds == [0, 1, 0]
    monkeypatch.setattr(trainer, "train", stub_train)
    again = worker.run(sweep, tmp_path, settings(dataset), retry_failed=True)
    assert again.ran == (bad,) and len(again.done) == 3 and not again.failed


@pytest.mark.slow
def test_a_worker_whose_cells_all_fail_stops(dataset, tmp_path, monkeypatch):
    def fail(cfg, workdir, **options):
        raise RuntimeError("the chip has gone")

    monkeypatch.setattr(trainer, "train", fail)
    budget = 100.5 * tiny_sweep.PER_STEP
    cells = grid(
        tiny_sweep.RECIPE, objectives=("mdm",), sizes={"a": tiny_sweep.MODEL}, budgets=(budget,), seeds=range(5)
    )
    sweep = tiny_sweep.tiny_sweep(cells=tuple(cells))
    with pytest.raises(UserError, match="3 cells in a row have failed, the last with RuntimeError: the chip has gone"):
        worker.run(sweep, tmp_path, settings(dataset))
    current = status.status(sweep, tmp_path)
    assert [current.count(state) for state in ("failed", "pending")] == [3, 2]


@pytest.mark.parametrize("as_user_error", [False, True])
def test_trouble_with_files_is_not_the_cells_failure(dataset, sweep, tmp_path, monkeypatch, as_user_error):
    def fail(cfg, workdir, **options):
        error = OSError(28, "No space left on device")
        if as_user_error:
            raise UserError("cannot write the metrics") from error
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(UserError, match="No space left on device|cannot write the metrics"):
        worker.run(sweep, tmp_path, settings(dataset))
    assert status.status(sweep, tmp_path).count("pending") == 3


@pytest.mark.slow
def test_a_signal_between_two_cells_is_not_lost(dataset, sweep, tmp_path, monkeypatch):
    claim, ids = Leases.claim, [cell.id for cell in sweep.select()]

    def claim_and_signal(self, cell, *args, **options):
        lease = claim(self, cell, *args, **options)
        if cell == ids[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return lease

    monkeypatch.setattr(Leases, "claim", claim_and_signal)
    end = worker.run(sweep, tmp_path, settings(dataset))
    assert end.stopped and end.ran == end.done == (ids[0],)
    assert status.status(sweep, tmp_path).count("pending") == 2, "it was released"


@pytest.mark.slow
def test_a_worker_that_need_not_wait_leaves_the_cells_of_others_to_them(dataset, sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.1)
    with Leases(tmp_path / "leases").claim(sweep.select()[0].id, seconds=4.0) as other:
        end = worker.run(sweep, tmp_path, settings(dataset), wait=False)
        assert len(end.done) == 2 and not end.failed
        running = status.status(sweep, tmp_path).cells[0]
        assert running.state == "running" and running.holder.endswith(f":{os.getpid()}") and running.starts == 1
        other.release()


@pytest.mark.slow
def test_nor_does_it_leave_those_of_the_dead(finished, dataset, sweep, monkeypatch):
    """It has not seen their leases before, so that it watches them for as long as they last."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.1)
    last = sweep.cells[2].id
    for path in (finished / "cells" / last).iterdir():
        path.unlink()
    (finished / "cells" / last).rmdir()
    (finished / "leases" / last).unlink()
    Leases(finished / "leases").claim(last, seconds=1.0)  # and nobody renews it
    end = worker.run(sweep, finished, settings(dataset), wait=False)
    assert end.ran == (last,) and len(end.done) == 3
    assert Leases(finished / "leases").records([last])[last].starts == 2


@pytest.mark.slow
def test_a_finished_cell_whose_lease_does_not_say_so_is_not_run_again(finished, dataset, sweep, monkeypatch):
    """Its worker died between writing DONE.json and the lease."""
    (finished / "leases" / sweep.cells[0].id).unlink()
    monkeypatch.setattr(trainer, "train", None)
    end = worker.run(sweep, finished, settings(dataset))
    assert not end.ran and len(end.done) == 3


def test_a_workers_own_mistake_fails_no_cell(dataset, sweep, tmp_path, monkeypatch):
    def refused(message, changes):
        with pytest.raises(UserError, match=message):
            worker.run(sweep, tmp_path, settings(dataset) | changes)
        assert status.status(sweep, tmp_path).count("pending") == 3 and not (tmp_path / "leases").exists()

    refused("mesh.fsdp=3 x .* does not fit 1 device", {"mesh.fsdp": 3})
    refused("run.init_from=elsewhere is part of what a cell measures", {"run.init_from": "elsewhere"})
    monkeypatch.setattr(trainer, "make_mesh", make_mesh)  # on eight devices
    refused("data.batch_size=16 in run.microbatches=4 parts cannot be split over", {"run.microbatches": 4})


def test_what_is_science_cannot_be_set_for_a_worker(dataset, sweep, tmp_path):
    for name, value in {"optim.peak_lr": 1.0, "run.seed": 0}.items():  # not at its default either
        with pytest.raises(UserError, match=f"{name}={value} is part of what a cell measures"):
            worker.run(sweep, tmp_path, settings(dataset) | {name: value})
    with pytest.raises(UserError, match="unknown field 'mesh.fsd'; did you mean 'mesh.fsdp'"):
        worker.run(sweep, tmp_path, {"mesh.fsd": 2})


def test_a_sweep_needs_a_name_and_a_lease_must_be_of_use(dataset, sweep, tmp_path):
    with pytest.raises(UserError, match="the sweep has no name"):
        worker.run(replace(sweep, name=""), tmp_path, settings(dataset))
    for seconds in (0, float("nan"), float("inf"), 1e300):  # no thread can wait so long
        with pytest.raises(UserError, match=re.escape(f"lease_seconds={seconds} must be positive, and at most 86400")):
            worker.run(sweep, tmp_path / "new", settings(dataset), lease_seconds=seconds)


@pytest.mark.slow
def test_a_cell_whose_evaluation_is_not_finite_is_done_and_the_worker_goes_on(
    dataset, sweep, tmp_path, monkeypatch, capsys
):
    def train(cfg, workdir, **options):
        run = tiny_sweep.stub_train(cfg, workdir, **options)
        run.result["eval"] |= dict.fromkeys(("nelbo_nats_per_token", "nelbo_stderr", "bits_per_byte"), math.nan)
        return run

    monkeypatch.setattr(trainer, "train", train)
    end = worker.run(sweep, tmp_path, settings(dataset))
    assert len(end.done) == 3 and not end.failed
    assert "".join(capsys.readouterr()).count(": its evaluation is not finite; ") == 3
