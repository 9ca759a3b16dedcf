"""Workers that train: no cell is run twice, none is lost, and their results are those of one worker alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from support import child_processes, tiny_sweep
from support.tiny_sweep import settings

from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.scaling.sweep import results, status, worker
from diffusionlm.scaling.sweep.lease import Leases
from diffusionlm.scaling.sweep.recipe import grid
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics, programs, timeline

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(one_device, dataset, tmp_path_factory):
    """The directory of a sweep that one worker has finished, its end, and the live arrays as each cell began."""
    workdir = tmp_path_factory.mktemp("alone") / "sweep"
    train, arrays = trainer.train, []

    def train_and_count(*args, **options):
        arrays.append(len(jax.live_arrays()))
        return train(*args, **options)

    programs.train_program.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train", train_and_count)
        end = worker.run(tiny_sweep.tiny_sweep(), workdir, settings(dataset))
    return workdir, end, arrays


class Worker:
    """A worker process."""

    def __init__(
        self, dataset, workdir, lease_seconds=60.0, seconds_a_step=0.01, cells=3, meeting="", environment=None
    ):
        command = [sys.executable, tiny_sweep.__file__, dataset, workdir, lease_seconds, seconds_a_step, cells, meeting]
        self.process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log: list[str] = []

    def events(self):
        for line in self.process.stdout:
            if line.startswith('{"event"'):
                yield json.loads(line)
            else:
                self.log.append(line)

    def until(self, **values):
        """Read on up to an event with these values."""
        for event in self.events():
            if values.items() <= event.items():
                return event
        raise AssertionError(f"it ended without {values}:\n{''.join(self.log)}")


@pytest.fixture
def start(dataset):
    """Start worker processes that do not outlive the test."""
    started = []

    def begin(workdir, **options):
        process = Worker(dataset, workdir, **options)
        started.append(process.process)
        return process

    with child_processes.at_most(240, started):
        yield begin
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def starts(workdir, cell):
    return sum(line["event"] == "start" for line in timeline.read(workdir / "cells" / cell))


def measured(workdir, sweep):
    """Return what the cells measured, and the steps that their metrics hold."""
    cells, unfinished = results.read(sweep, workdir)
    assert not unfinished
    return cells, {cell.id: [line["step"] for line in metrics.read(workdir / "cells" / cell.id)] for cell in cells}


def test_one_worker_runs_every_cell_once_cheap_ones_first(alone, sweep):
    workdir, end, _ = alone
    ids = [cell.id for cell in sweep.select()]
    assert end.ran == end.done == tuple(ids) and not end.failed and not end.stopped
    assert [starts(workdir, cell) for cell in ids] == [1, 1, 1]
    records = Leases(workdir / "leases").records(ids)
    assert {record.state for record in records.values()} == {"done"} and len(records) == 3
    cells, unfinished = results.read(sweep, workdir)
    assert not unfinished and [(cell.seed, cell.steps) for cell in cells] == [(0, 100), (1, 100), (0, 120)]
    assert len({cell.loss for cell in cells}) == 3
    for cell in cells:
        assert cell.loss == pytest.approx(sum(cell.loss_per_draw) / 2)
        assert cell.flops == cell.steps * tiny_sweep.PER_STEP and cell.curve[-1][0] == pytest.approx(cell.flops)


def test_the_devices_are_free_for_the_next_cell(alone):
    """The memory of the last cell is free, whether or not Python's garbage collector has run."""
    first, *others = alone[2]
    assert len(others) == 2 and max(others) - first <= 20, "scalars of the compiled step at most, never a state"


def test_cells_of_the_same_shape_share_a_program(alone, dataset, sweep, tmp_path):
    """Seed, steps and learning rate are data of the compiled step, and it is compiled once."""
    recipe = replace(tiny_sweep.RECIPE, peak_lr=3e-3, weight_decay=0.0, warmup_steps=3)
    budgets = (130.5 * tiny_sweep.PER_STEP,)
    others = grid(recipe, objectives=("mdm",), sizes={"one": tiny_sweep.MODEL}, budgets=budgets, seeds=(2**31 + 1,))
    assert programs.train_program.cache_info().misses == 1
    worker.run(replace(sweep, cells=tuple(others)), tmp_path, settings(dataset))
    assert programs.train_program.cache_info().misses == 1
    mesh = trainer.make_mesh(others[0].config.mesh)
    shape = programs.structure(others[0].config)
    program = programs.train_program(shape, mesh)
    assert programs.train_program.cache_info().misses == 1 and program._cache_size() <= 2


def test_a_cell_is_the_same_on_another_mesh(alone, dataset, sweep, tmp_path, monkeypatch):
    """Neither its identity nor, but for rounding, its result depends on the mesh and on micro-batches."""
    monkeypatch.setattr(trainer, "make_mesh", make_mesh)
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    other = settings(dataset) | mesh | {"run.microbatches": 2, "run.keep": 2}
    one_cell = replace(sweep, cells=sweep.cells[:1])
    worker.run(one_cell, tmp_path, other)
    (cell,), unfinished = results.read(one_cell, tmp_path)
    (expected, *_), _ = results.read(sweep, alone[0])
    assert not unfinished and cell.id == expected.id
    assert cell.loss == pytest.approx(expected.loss, rel=1e-4)


def test_workers_that_sleep_die_and_are_stopped_lose_no_cell_and_run_none_twice(alone, sweep, start, tmp_path):
    """Three workers sleep past a lease, are killed or get a signal; two others finish together."""
    workdir, meeting = tmp_path / "sweep", tmp_path / "meeting"
    meeting.mkdir()
    ids = [cell.id for cell in sweep.select()]
    sleeper = start(workdir, lease_seconds=2.0, seconds_a_step=0.05)
    sleeper.until(event="step", seed=0, steps=100, index=20)
    sleeper.process.send_signal(signal.SIGSTOP)
    killed = start(workdir, lease_seconds=2.0, seconds_a_step=0.05)
    killed.until(event="step", seed=1, steps=100, index=20)
    killed.process.send_signal(signal.SIGKILL)

    # The lease of a process of this machine that is dead has expired; one that sleeps must be watched for its term.
    stopped = start(workdir, lease_seconds=2.0, seconds_a_step=0.05)
    stopped.until(event="step", seed=1, steps=100, index=30)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.until(event="finished")["stopped"]
    second = status.status(sweep, workdir).cells[1]
    assert second.state == "pending" and second.step >= 30 and second.note == "stopped on the way"

    last = [start(workdir, lease_seconds=2.0, meeting=meeting) for _ in range(2)]
    events = [[], []]
    threads = [
        threading.Thread(target=lambda process=process, to=to: to.extend(process.events()))
        for process, to in zip(last, events, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = [of_process[-1] for of_process in events]
    ran = [cell for end in ends for cell in end["ran"]]
    assert sorted(ran) == sorted(ids) and all(end["done"] == ids for end in ends), "each cell by one worker"
    assert all(end["ran"] for end in ends), "at their first steps both had a cell"
    first = min(e["index"] for of_process in events for e in of_process if e["event"] == "step" and e["seed"] == 1)
    assert first >= second.step, "what was saved is not done again"

    sleeper.process.send_signal(signal.SIGCONT)
    end = sleeper.until(event="finished")
    assert end["ran"] == [] and end["done"] == ids
    sleeper.process.wait()
    assert "another worker has taken it over" in "".join(sleeper.log)
    assert [starts(workdir, cell) for cell in ids] == [2, 3, 1]
    assert measured(workdir, sweep) == measured(alone[0], sweep), "nor has the sleeper written anything more"


def test_a_slice_of_two_hosts_is_one_worker(alone, sweep, start, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    hosts = [
        start(tmp_path, seconds_a_step=0.0, cells=2, environment=shared | {"JAX_PROCESS_ID": str(i)}) for i in range(2)
    ]
    ends = [host.until(event="finished") for host in hosts]
    two_cells = replace(sweep, cells=sweep.cells[:2])
    ids = [cell.id for cell in two_cells.select()]
    assert ends[0] == ends[1] and ends[0]["ran"] == ids
    assert [starts(tmp_path, cell) for cell in ids] == [1, 1]
    cells, expected = measured(tmp_path, two_cells)[0], measured(alone[0], two_cells)[0]
    # Two devices: equal but for rounding, which a hundred steps of training amplify.
    assert [cell.loss for cell in cells] == pytest.approx([cell.loss for cell in expected], rel=1e-3)
