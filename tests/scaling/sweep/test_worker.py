"""Workers on a sweep: no cell is run twice, none is lost, and what they find is what one worker alone finds."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import jax
import pytest
from support import tiny_run, tiny_sweep
from support.tiny_sweep import settings

from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.scaling.sweep import results, status, worker
from diffusionlm.scaling.sweep.lease import Board
from diffusionlm.scaling.sweep.recipe import Sweep, grid
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics, programs, timeline


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

    def __init__(
        self, dataset, workdir, compiled, lease_seconds=60.0, seconds_a_step=0.01, environment=None, meeting=""
    ):
        command = [sys.executable, tiny_sweep.__file__, dataset, workdir, lease_seconds, seconds_a_step, meeting]
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
    records = Board(workdir / "leases").records(cells)
    assert {record.state for record in records.values()} == {"done"} and len(records) == 3
    found, missing = results.read(sweep, workdir)
    assert not missing and [(one.seed, one.steps) for one in found] == [(0, 100), (1, 100), (0, 120)]
    assert len({one.loss for one in found}) == 3
    for one in found:
        assert one.loss == pytest.approx(sum(one.loss_per_draw) / 2) and one.flops == one.steps * tiny_sweep.PER_STEP
        assert one.curve[-1][0] == pytest.approx(one.flops)


def test_two_workers_never_run_a_cell_twice_and_find_the_same(alone, sweep, start, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    two = [start(tmp_path / "sweep", meeting=meeting) for _ in range(2)]
    threads = [threading.Thread(target=lambda one=one: one.__setattr__("told", list(one.events()))) for one in two]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = [one.told[-1] for one in two]
    ran = [cell for end in ended for cell in end["ran"]]
    cells = [cell.id for cell in sweep.select()]
    assert sorted(ran) == sorted(cells) and all(end["done"] == cells for end in ended)
    assert all(end["ran"] for end in ended), "at their first steps both had a cell"
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


def test_a_worker_whose_cells_all_fail_stops(dataset, tmp_path, monkeypatch):
    def trouble(cfg, workdir, **options):
        raise RuntimeError("the chip has gone")

    monkeypatch.setattr(trainer, "train", trouble)
    budget = 100.5 * tiny_sweep.PER_STEP
    cells = grid(
        tiny_sweep.RECIPE, objectives=("mdm",), sizes={"a": tiny_sweep.MODEL}, budgets=(budget,), seeds=range(5)
    )
    sweep = tiny_sweep.tiny_sweep(cells=tuple(cells))
    with pytest.raises(UserError, match="3 cells in a row have failed, the last with RuntimeError: the chip has gone"):
        worker.run(sweep, tmp_path, settings(dataset))
    found = status.status(sweep, tmp_path)
    assert [found.count(state) for state in ("failed", "pending")] == [3, 2]


@pytest.mark.parametrize("as_user_error", [False, True])
def test_trouble_with_files_is_not_the_cells_failure(dataset, sweep, tmp_path, monkeypatch, as_user_error):
    def trouble(cfg, workdir, **options):
        error = OSError(28, "No space left on device")
        if as_user_error:
            raise UserError("cannot write the metrics") from error
        raise error

    monkeypatch.setattr(trainer, "train", trouble)
    with pytest.raises(UserError, match="No space left on device|cannot write the metrics"):
        worker.run(sweep, tmp_path, settings(dataset))
    assert status.status(sweep, tmp_path).count("pending") == 3


def test_a_signal_between_two_cells_is_not_lost(dataset, sweep, tmp_path, monkeypatch):
    claim, ids = Board.claim, [cell.id for cell in sweep.select()]

    def claim_and_signal(self, cell, *args, **options):
        lease = claim(self, cell, *args, **options)
        if cell == ids[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return lease

    monkeypatch.setattr(Board, "claim", claim_and_signal)
    found = worker.run(sweep, tmp_path, settings(dataset))
    assert found.stopped and found.ran == found.done == (ids[0],)
    assert status.status(sweep, tmp_path).count("pending") == 2, "it was given back"


def test_the_devices_are_free_for_the_next_cell(dataset, sweep, tmp_path, monkeypatch):
    """What the last one held is gone, whatever Python's garbage collector was up to."""
    train, held = trainer.train, []
    kept = len(jax.live_arrays())

    def look(cfg, workdir, **options):
        held.append(len(jax.live_arrays()) - kept)
        return train(cfg, workdir, **options)

    monkeypatch.setattr(trainer, "train", look)
    worker.run(sweep, tmp_path, settings(dataset))
    assert len(held) == 3 and max(held) <= 20, "scalars of the one compiled step at most, never a state"


def test_a_worker_that_need_not_wait_leaves_others_cells_to_them(dataset, sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.1)
    with Board(tmp_path / "leases").claim(sweep.select()[0].id, seconds=20.0) as other:
        found = worker.run(sweep, tmp_path, settings(dataset), wait=False)
        assert len(found.done) == 2 and not found.failed
        running = status.status(sweep, tmp_path).cells[0]
        assert running.state == "running" and running.holder.endswith(f":{os.getpid()}") and running.starts == 1
        other.release()


def test_nor_does_it_leave_those_of_the_dead(alone, dataset, sweep, tmp_path, monkeypatch):
    """It has not seen their leases before, so that it watches them for as long as they last."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.1)
    workdir, last = tmp_path / "copy", sweep.cells[2].id
    shutil.copytree(alone[0], workdir)
    shutil.rmtree(workdir / "cells" / last)
    (workdir / "leases" / last).unlink()
    Board(workdir / "leases").claim(last, seconds=1.0)  # and nobody renews it
    found = worker.run(sweep, workdir, settings(dataset), wait=False)
    assert found.ran == (last,) and len(found.done) == 3
    assert Board(workdir / "leases").records([last])[last].starts == 2


def test_a_workers_own_mistake_fails_no_cell(dataset, sweep, tmp_path, monkeypatch):
    def refused(message, changes):
        with pytest.raises(UserError, match=message):
            worker.run(sweep, tmp_path, settings(dataset) | changes)
        assert status.status(sweep, tmp_path).count("pending") == 3 and not (tmp_path / "leases").exists()

    refused("mesh.fsdp=3 x .* does not fit 1 device", {"mesh.fsdp": 3})
    refused("run.init_from=elsewhere is part of what a cell measures", {"run.init_from": "elsewhere"})
    monkeypatch.setattr(trainer, "make_mesh", make_mesh)  # on eight
    refused("data.batch_size=16 in run.microbatches=4 parts cannot be split over", {"run.microbatches": 4})


def test_cells_of_the_same_shape_share_a_program(dataset, sweep, tmp_path):
    """Seed, steps and learning rate are data of the compiled step, and it is compiled once."""
    recipe = replace(tiny_sweep.RECIPE, peak_lr=3e-3, weight_decay=0.0, warmup_steps=3)
    budgets = (130.5 * tiny_sweep.PER_STEP,)
    others = grid(recipe, objectives=("mdm",), sizes={"one": tiny_sweep.MODEL}, budgets=budgets, seeds=(2**31 + 1,))
    programs.train_program.cache_clear()
    worker.run(replace(sweep, cells=sweep.cells + tuple(others)), tmp_path, settings(dataset))
    assert programs.train_program.cache_info().misses == 1
    mesh = trainer.make_mesh(others[0].config.mesh)
    program = programs.make_train_step(others[0].config, mesh)._program
    assert programs.train_program.cache_info().misses == 1 and program._cache_size() <= 2


def test_what_is_science_cannot_be_set_for_a_worker(dataset, sweep, tmp_path):
    for name, value in {"optim.peak_lr": 1.0, "run.seed": 0}.items():  # not at its default either
        with pytest.raises(UserError, match=f"{name}={value} is part of what a cell measures"):
            worker.run(sweep, tmp_path, settings(dataset) | {name: value})
    with pytest.raises(UserError, match="unknown field 'mesh.fsd'; did you mean 'mesh.fsdp'"):
        worker.run(sweep, tmp_path, {"mesh.fsd": 2})


def test_a_cell_is_the_same_on_another_mesh(alone, dataset, sweep, tmp_path, monkeypatch):
    """Neither its identity nor, but for rounding, its result depends on the mesh and on micro-batches."""
    monkeypatch.setattr(trainer, "make_mesh", make_mesh)
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    other = settings(dataset) | mesh | {"run.microbatches": 2, "run.keep": 2}
    one_cell = replace(sweep, cells=sweep.cells[:1])
    worker.run(one_cell, tmp_path, other)
    (found,), missing = results.read(one_cell, tmp_path)
    (expected, *_), _ = results.read(sweep, alone[0])
    assert not missing and found.id == expected.id
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_what_was_planned_before_is_not_forgotten(alone, sweep, dataset, caplog):
    """A recipe that was changed has other cells, and the finished ones are told."""
    changed = replace(sweep, cells=sweep.cells[:2])
    assert status.status(changed, alone[0]).unplanned == (sweep.cells[2].id,)
    with pytest.raises(UserError, match="is of sweep 'tiny', not 'other'"):
        status.status(replace(sweep, name="other"), alone[0])
    recipe = replace(tiny_sweep.RECIPE, peak_lr=3e-3)
    sizes, budgets = {"one": tiny_sweep.MODEL}, (100.5 * tiny_sweep.PER_STEP,)
    edited = replace(sweep, cells=tuple(grid(recipe, objectives=("mdm",), sizes=sizes, budgets=budgets)))
    with pytest.raises(UserError, match="holds 3 cells, and none is of this sweep, whose recipe must have changed"):
        worker.run(edited, alone[0], settings(dataset))
    caplog.clear()
    assert worker.run(changed, alone[0], settings(dataset)).done == tuple(cell.id for cell in changed.select())
    assert "1 of the 3 cells" in caplog.text and "the recipe asks for" not in caplog.text


def test_a_finished_cell_whose_lease_was_not_noted_is_not_run_again(alone, dataset, sweep, tmp_path):
    """Its worker died between DONE.json and the lease."""
    workdir = tmp_path / "copy"
    shutil.copytree(alone[0], workdir)
    (workdir / "leases" / sweep.cells[0].id).unlink()
    found = worker.run(sweep, workdir, settings(dataset))
    assert not found.ran and len(found.done) == 3
    assert starts(workdir, sweep.cells[0].id) == 1


def test_a_sweep_without_cells_or_with_cells_that_do_not_go_together_is_refused(sweep, dataset, tmp_path):
    with pytest.raises(UserError, match="sweep 'none' has no cells"):
        Sweep((), name="none")
    longer = replace(tiny_sweep.RECIPE, sequence_length=32)
    model = replace(tiny_sweep.MODEL, max_length=32)
    other = grid(longer, objectives=("mdm",), sizes={"one": model}, budgets=(1e10,))
    with pytest.raises(UserError, match="cells of data.sequence_length 16 and 32, which are not comparable"):
        Sweep(sweep.cells + tuple(other), name="mixed")
    with pytest.raises(UserError, match="the sweep has no name"):
        worker.run(replace(sweep, name=""), tmp_path, settings(dataset))


def test_directories_and_data_are_not_mixed_up(alone, dataset, sweep, tmp_path):
    with pytest.raises(UserError, match="holds another sweep: sweep tiny there, other here"):
        worker.run(replace(sweep, name="other"), alone[0], settings(dataset))
    another = tiny_run.make_dataset(tmp_path / "data", seed=1)
    with pytest.raises(UserError, match="begun with other data: dataset .* there.*--data.path"):
        worker.run(sweep, alone[0], settings(another))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot go on with the sweep in .*file: "):
        worker.run(sweep, tmp_path / "file", settings(dataset))
    with pytest.raises(UserError, match="names no data: give --data.path.* --tokenizer byte --sequence_length 16"):
        worker.run(sweep, tmp_path / "new")
    longer = replace(tiny_sweep.RECIPE, sequence_length=8)
    other = grid(longer, objectives=("mdm",), sizes={"one": tiny_sweep.MODEL}, budgets=(1e9,))
    with pytest.raises(UserError, match="has 257 tokens and sequences of 16, and the cells need 257 and 8: make"):
        worker.run(Sweep(tuple(other), name="short"), tmp_path / "short", settings(dataset))
    for seconds in (0, float("nan"), float("inf"), 1e300):  # no thread can wait so long
        with pytest.raises(UserError, match=re.escape(f"lease_seconds={seconds} must be positive, and at most 86400")):
            worker.run(sweep, tmp_path / "new", settings(dataset), lease_seconds=seconds)
    with pytest.raises(UserError, match="has no sweep.json, so no worker has begun there"):
        results.read(sweep, tmp_path / "new")
    with pytest.raises(UserError, match="is of sweep 'tiny'"):
        results.read(replace(sweep, name="other"), alone[0])


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"eval": {}}', '{"eval": []}', '{"eval": {"x": 1}}'])
def test_a_damaged_result_is_named(alone, sweep, tmp_path, content):
    workdir = tmp_path / "copy"
    shutil.copytree(alone[0], workdir)
    cell = workdir / "cells" / sweep.cells[0].id
    (cell / "DONE.json").write_text(content)
    for read in (results.read, status.status):
        with pytest.raises(UserError, match=r"DONE.json.* is damaged .*; delete "):
            read(sweep, workdir)


@pytest.mark.parametrize("content", ["3\n", '{"loss": 1, "step_seconds": 1}\n', '{"step": 1, "loss": "x"}\n'])
def test_damaged_metrics_are_named(alone, sweep, tmp_path, content):
    workdir = tmp_path / "copy"
    shutil.copytree(alone[0], workdir)
    cell = workdir / "cells" / sweep.cells[0].id
    (cell / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match="metrics.jsonl beside it, is damaged"):
        results.read(sweep, workdir)
    (cell / "DONE.json").unlink()
    if "x" not in content:  # of a loss on the way it says nothing
        with pytest.raises(UserError, match="metrics.jsonl is damaged"):
            status.status(sweep, workdir)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"sweep": "tiny", "dataset": "x"}', b"\xff"])
def test_a_damaged_identity_is_named(dataset, sweep, tmp_path, content):
    (tmp_path / "sweep.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    actions = [lambda: results.read(sweep, tmp_path), lambda: status.status(sweep, tmp_path)]
    for action in [*actions, lambda: worker.run(sweep, tmp_path, settings(dataset))]:
        with pytest.raises(UserError, match="sweep.json is damaged .*; delete it"):
            action()


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
