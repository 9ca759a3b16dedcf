"""Workers on a sweep: no cell is run twice, none is lost, and what they find is what one worker alone finds."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import jax
import pytest
import tiny_run
import tiny_sweep
from helpers import count_compilations
from tiny_sweep import settings

from diffusionlm import metrics, timeline, trainer
from diffusionlm.config import Config, MeshConfig, OptimConfig
from diffusionlm.errors import UserError
from diffusionlm.scaling import results, status, worker
from diffusionlm.scaling.lease import Board
from diffusionlm.scaling.recipe import grid
from diffusionlm.sharding import make_mesh


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with tiny_run.compiled_programs(tmp_path_factory.getbasetemp() / "compiled") as directory:
        yield directory


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """As the worker processes have; the tests' own process has eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_run.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def sweep():
    return tiny_sweep.tiny_sweep()


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """The directory of a sweep that one worker has finished, and what it returned."""
    workdir = tmp_path_factory.mktemp("alone") / "sweep"
    return workdir, worker.run(tiny_sweep.tiny_sweep(), workdir, settings(dataset))


class Worker:
    """A worker process."""

    def __init__(self, dataset, workdir, compiled, lease_seconds=60.0, seconds_a_step=0.01, environment=None):
        command = [sys.executable, tiny_sweep.__file__, dataset, workdir, lease_seconds, seconds_a_step]
        self.process = subprocess.Popen(
            list(map(str, command)),
            env=tiny_run.environment(compiled) | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []

    def events(self):
        for line in self.process.stdout:
            if line.startswith('{"event"'):
                yield json.loads(line)
            else:
                self.said.append(line)

    def until(self, **wanted):
        """Reads on up to an event with these values."""
        for event in self.events():
            if wanted.items() <= event.items():
                return event
        raise AssertionError(f"it ended without {wanted}:\n{''.join(self.said)}")


@pytest.fixture
def start(dataset, compiled):
    """Starts worker processes that do not outlive the test."""
    processes = []

    def begin(workdir, **options):
        one = Worker(dataset, workdir, compiled, **options)
        processes.append(one.process)
        return one

    with tiny_run.at_most(240, processes):
        yield begin
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def starts(workdir, cell):
    return sum(line["event"] == "start" for line in timeline.read(workdir / "cells" / cell))


def findings(workdir, sweep):
    """What the cells measured, and their training losses step by step."""
    found, missing = results.read(sweep, workdir)
    assert not missing
    steps = {one.id: [line["step"] for line in metrics.read(workdir / "cells" / one.id)] for one in found}
    return found, steps


def test_one_worker_runs_every_cell_once_cheap_ones_first(alone, sweep):
    workdir, finished = alone
    cells = [cell.id for cell in sweep.select()]
    assert finished.ran == finished.done == tuple(cells) and not finished.failed and not finished.stopped
    assert [starts(workdir, cell) for cell in cells] == [1, 1, 1]
    assert not Board(workdir / "leases").records(), "all were given back"
    found, missing = results.read(sweep, workdir)
    assert not missing and [(one.seed, one.steps) for one in found] == [(0, 100), (1, 100), (0, 120)]
    assert len({one.loss for one in found}) == 3
    for one in found:
        assert one.loss == pytest.approx(sum(one.loss_per_draw) / 2) and one.flops == one.steps * tiny_sweep.PER_STEP
        assert one.curve[-1][0] == pytest.approx(one.flops)


def test_two_workers_never_run_a_cell_twice_and_find_the_same(alone, sweep, start, tmp_path):
    two = [start(tmp_path / "sweep") for _ in range(2)]
    threads = [threading.Thread(target=lambda one=one: one.__setattr__("told", list(one.events()))) for one in two]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = [one.told[-1] for one in two]
    ran = [cell for end in ended for cell in end["ran"]]
    cells = [cell.id for cell in sweep.select()]
    assert sorted(ran) == sorted(cells) and all(end["done"] == cells for end in ended)
    assert all(end["ran"] for end in ended), "both had a part in it"
    assert [starts(tmp_path / "sweep", cell) for cell in cells] == [1, 1, 1]
    assert findings(tmp_path / "sweep", sweep) == findings(alone[0], sweep)


def test_a_killed_workers_cell_is_finished_by_another(alone, sweep, start, tmp_path):
    workdir = tmp_path / "sweep"
    first = start(workdir, lease_seconds=2.0, seconds_a_step=0.05)
    first.until(event="step", index=20)
    first.process.send_signal(signal.SIGKILL)
    second = start(workdir, lease_seconds=2.0)
    ended = second.until(event="finished")
    cells = [cell.id for cell in sweep.select()]
    assert sorted(ended["ran"]) == sorted(cells) and ended["done"] == cells
    assert [starts(workdir, cell) for cell in cells] == [2, 1, 1]
    assert findings(workdir, sweep) == findings(alone[0], sweep)


def test_who_sleeps_past_its_lease_notices_and_leaves_the_cell_alone(alone, sweep, start, tmp_path):
    workdir = tmp_path / "sweep"
    first = start(workdir, lease_seconds=2.0, seconds_a_step=0.05)
    first.until(event="step", index=20)
    first.process.send_signal(signal.SIGSTOP)
    second = start(workdir, lease_seconds=2.0)
    assert len(second.until(event="finished")["ran"]) == 3
    first.process.send_signal(signal.SIGCONT)
    ended = first.until(event="finished")
    assert ended["ran"] == [] and len(ended["done"]) == 3
    first.process.wait()
    assert "another worker has taken it over" in "".join(first.said)
    assert findings(workdir, sweep) == findings(alone[0], sweep), "the sleeper has written nothing more"


def test_a_signal_stops_between_steps_and_the_next_worker_goes_on(alone, sweep, start, tmp_path):
    workdir = tmp_path / "sweep"
    first = start(workdir, seconds_a_step=0.05)
    first.until(event="step", index=20)
    first.process.send_signal(signal.SIGTERM)
    assert first.until(event="finished")["stopped"]
    waiting = status.status(sweep, workdir)
    assert waiting.count("pending") == 3 and waiting.cells[0].step >= 20
    assert waiting.cells[0].note == "stopped on the way"
    second = start(workdir)
    step = second.until(event="step")
    assert step["index"] >= waiting.cells[0].step, "what was saved is not done again"
    assert len(second.until(event="finished")["ran"]) == 3
    assert findings(workdir, sweep) == findings(alone[0], sweep)


def test_a_slice_of_two_hosts_is_one_worker(alone, sweep, start, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    hosts = [start(tmp_path, environment=shared | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    ended = [host.until(event="finished") for host in hosts]
    cells = [cell.id for cell in sweep.select()]
    assert ended[0] == ended[1] and ended[0]["ran"] == cells
    assert [starts(tmp_path, cell) for cell in cells] == [1, 1, 1]
    found, expected = findings(tmp_path, sweep)[0], findings(alone[0], sweep)[0]
    # Two devices: equal but for rounding, which a hundred steps of training blow up.
    assert [one.loss for one in found] == pytest.approx([one.loss for one in expected], rel=1e-3)


def test_a_failed_cell_is_recorded_and_the_others_go_on(dataset, sweep, tmp_path, monkeypatch):
    train, told = trainer.train, []

    def trouble(cfg, workdir, **options):
        told.append(cfg.run.seed)
        if cfg.run.seed == 1:
            raise MemoryError("no room\nat all")
        return train(cfg, workdir, **options)

    monkeypatch.setattr(trainer, "train", trouble)
    first = worker.run(sweep, tmp_path, settings(dataset))
    bad = sweep.select()[1].id
    assert first.failed == (bad,) and len(first.done) == 2
    found = status.status(sweep, tmp_path)
    assert [cell.state for cell in found.cells] == ["done", "failed", "done"]
    assert found.cells[1].note == "MemoryError: no room at all"
    assert worker.run(sweep, tmp_path, settings(dataset)).failed == (bad,), "it is not begun again unasked"
    assert told == [0, 1, 0]
    monkeypatch.setattr(trainer, "train", train)
    again = worker.run(sweep, tmp_path, settings(dataset), retry_failed=True)
    assert again.ran == (bad,) and len(again.done) == 3 and not again.failed


def test_a_worker_that_need_not_wait_leaves_others_cells_to_them(dataset, sweep, tmp_path):
    other = Board(tmp_path / "leases").claim(sweep.select()[0].id)
    found = worker.run(sweep, tmp_path, settings(dataset), wait=False)
    assert len(found.done) == 2 and not found.failed
    running = status.status(sweep, tmp_path).cells[0]
    assert running.state == "running" and running.holder.endswith(f":{os.getpid()}")
    other.release()


def test_cells_of_the_same_shape_share_a_compilation(dataset, tmp_path):
    """Seed, length and learning rate are data of the compiled step."""
    cells = grid(
        replace(tiny_sweep.RECIPE, peak_lr=3e-3),
        objectives=("mdm",),
        sizes={"one": tiny_sweep.MODEL},
        budgets=(110.5 * tiny_sweep.PER_STEP,),
        seeds=(5,),
    )
    worker.run(replace(tiny_sweep.tiny_sweep(), name="before"), tmp_path / "before", settings(dataset))
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_misses" else None
    )
    with count_compilations():
        worker.run(replace(tiny_sweep.tiny_sweep(), cells=tuple(cells)), tmp_path / "other", settings(dataset))
    assert not hits


def test_what_is_science_cannot_be_set_for_a_worker(dataset, sweep, tmp_path):
    wrong = replace(settings(dataset), optim=OptimConfig(peak_lr=1.0))
    with pytest.raises(UserError, match="optim.peak_lr=1.0 is part of what a cell measures"):
        worker.run(sweep, tmp_path, wrong)


def test_a_cell_is_the_same_on_another_mesh(alone, dataset, sweep, tmp_path, monkeypatch):
    """Neither its identity nor, but for rounding, its result depends on the mesh and on micro-batches."""
    monkeypatch.setattr(trainer, "make_mesh", make_mesh)
    other = replace(settings(dataset), mesh=MeshConfig(fsdp=2, tensor=2, data=2))
    other = replace(other, run=replace(Config().run, microbatches=2))
    one_cell = replace(sweep, cells=sweep.cells[:1])
    worker.run(one_cell, tmp_path, other)
    (found,), missing = results.read(one_cell, tmp_path)
    (expected, *_), _ = results.read(sweep, alone[0])
    assert not missing and found.id == expected.id
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_directories_and_data_are_not_mixed_up(alone, dataset, sweep, tmp_path):
    with pytest.raises(UserError, match="holds another sweep: sweep tiny there, other here"):
        worker.run(replace(sweep, name="other"), alone[0], settings(dataset))
    another = tiny_run.make_dataset(tmp_path / "data", seed=1)
    with pytest.raises(UserError, match="holds another sweep: dataset .* there"):
        worker.run(sweep, alone[0], settings(another))
    with pytest.raises(UserError, match="names no data: give --data.path.* --vocab_size 257 --sequence_length 16"):
        worker.run(sweep, tmp_path / "new")
    with pytest.raises(UserError, match="lease_seconds=0 must be positive"):
        worker.run(sweep, tmp_path / "new", settings(dataset), lease_seconds=0)
    with pytest.raises(UserError, match="has no sweep.json, so no worker has begun there"):
        results.read(sweep, tmp_path / "new")
    with pytest.raises(UserError, match="is of sweep 'tiny'"):
        results.read(replace(sweep, name="other"), alone[0])


def test_a_sweep_prepares_its_own_source(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"word{i} and {i * 7919 % 1000}" for i in range(5_000)))
    model = replace(tiny_sweep.MODEL, vocab_size=300)
    budget = 100.5 * tiny_sweep.RECIPE.flops_per_step(model, "mdm")
    cells = grid(tiny_sweep.RECIPE, objectives=("mdm",), sizes={"one": model}, budgets=(budget,))
    sweep = tiny_sweep.tiny_sweep(cells=tuple(cells), source=str(text))
    assert len(worker.run(sweep, tmp_path / "sweep").ran) == 1
    assert (tmp_path / "sweep" / "data" / "meta.json").exists()


def test_the_numbers_of_a_finished_sweep_survive_a_file(alone, sweep, tmp_path):
    found, _ = results.read(sweep, alone[0])
    results.save(found, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == found
