"""Leases: one holder at a time, whatever dies, sleeps or loses an answer."""

import threading
import time

import pytest

from diffusionlm.errors import UserError
from diffusionlm.ownership.conditional_writes import write_once
from diffusionlm.ownership.lease import LeaseLost
from diffusionlm.scaling.sweep.lease import Leases


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def new_worker(tmp_path):
    """Make workers' views of the leases in one directory, each with a clock of its own."""

    def make():
        clock = Clock()
        leases = Leases(tmp_path / "leases", clock)
        leases.clock = clock
        return leases

    return make


def test_of_many_workers_one_gets_a_cell(new_worker):
    workers, won, start = [new_worker() for _ in range(8)], [], threading.Barrier(8)

    def claim(worker):
        start.wait()
        for cell in map(str, range(20)):
            if lease := worker.claim(cell):
                won.append((cell, lease))

    threads = [threading.Thread(target=claim, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(cell) for cell, _ in won) == list(range(20))
    assert set(workers[0].records(list(map(str, range(20))))) == set(map(str, range(20)))


def test_a_released_cell_is_free_and_a_failed_one_only_on_request(new_worker):
    first, second = new_worker(), new_worker()
    first.claim("a").release()
    assert not first.records(["a"])
    second.claim("a").fail("out of memory")
    record = first.records(["a"])["a"]
    assert (record.state, record.reason) == ("failed", "out of memory")
    assert first.claim("a") is None
    first.clock.now = 1e6
    assert first.claim("a") is None, "nor does a failure expire"
    again = first.claim("a", retry_failed=True)
    assert again.starts == 2 and first.records(["a"])["a"].state == "running"


def test_a_lease_that_is_not_renewed_is_taken_over_once_it_was_seen_for_long_enough(new_worker):
    holder, other = new_worker(), new_worker()
    lease = holder.claim("a", seconds=60)
    other.clock.now = 1000  # its clock says nothing of the holder's: what counts is for how long it has watched
    assert other.claim("a") is None
    other.clock.now += 50
    lease.confirm()
    other.clock.now += 50  # 100 s after the first look, but the lease was renewed
    assert other.claim("a") is None
    other.clock.now += 59
    assert other.claim("a") is None
    other.clock.now += 2
    taken = other.claim("a")
    assert taken.starts == 2
    for use in (lease.confirm, lease.check, lease.release, lambda: lease.fail("late")):
        lease._clock.now += 1000  # it slept
        with pytest.raises(LeaseLost, match="cell a was taken over"):
            use()
    taken.confirm()  # nothing that the sleeper did has touched it
    assert other.records(["a"])["a"].state == "running"


def test_a_worker_that_slept_asks_before_the_next_write_and_continues_if_nobody_came(new_worker):
    lease = new_worker().claim("a", seconds=60)
    before = lease._generation
    lease.check()
    assert lease._generation == before, "a fresh lease does not read the store"
    lease._clock.now += 61
    lease.check()
    assert lease._generation != before


def test_a_lost_answer_is_not_a_lost_lease(new_worker):
    """A write that arrived, but whose answer did not, leaves a generation that the holder does not know."""
    worker = new_worker()
    lease = worker.claim("a")
    known = lease._generation
    lease.confirm()
    lease._generation = known
    lease.confirm()
    assert not lease.lost and worker.records(["a"])["a"].token == lease._record.token


def test_a_lease_is_renewed_in_the_background(new_worker):
    holder, other = new_worker(), new_worker()
    with holder.claim("a", seconds=0.2) as lease:
        assert other.claim("a") is None
        first = lease._generation
        deadline = time.monotonic() + 20
        while lease._generation == first and time.monotonic() < deadline:
            time.sleep(0.01)
        other.clock.now += 1  # longer than it lasts, but it is not the lease that was seen
        assert other.claim("a") is None
    other.clock.now += 1
    assert other.claim("a"), "nobody renews it any more"


def test_a_released_lease_is_not_renewed(new_worker):
    worker = new_worker()
    with worker.claim("a", seconds=0.05) as lease:
        lease.release()
        time.sleep(0.2)
    assert not worker.records(["a"])


def test_a_finished_cell_cannot_be_claimed(new_worker):
    worker = new_worker()
    worker.claim("a").done()
    worker.clock.now = 1e6
    assert worker.claim("a", retry_failed=True) is None
    assert worker.records(["a", "b"])["a"].state == "done"


def test_a_cell_that_kills_its_workers_has_failed(new_worker):
    """But not one that gets further each time, as on machines that are taken away again and again."""
    worker = new_worker()

    def die(step):
        lease = worker.claim("a", seconds=1, step=step)
        worker.claim("a")  # seen
        worker.clock.now += 2
        return lease

    assert all(die(step) for step in (0, 0, 0, 0, 10, 20, 20, 20, 20))
    assert worker.claim("a", step=20) is None
    record = worker.records(["a"])["a"]
    assert record.state == "failed" and "died 4 times in a row without getting past step 20" in record.reason
    assert worker.claim("a", step=20, retry_failed=True).starts == 11


@pytest.mark.parametrize("steps", [(300, 299, 300, 299, 300), (300, 100, 200, 299, 300)])
def test_a_cell_makes_no_progress_by_falling_back(new_worker, steps):
    """Its workers die some steps apart, and none gets further than the first."""
    worker = new_worker()
    for step in steps[:-1]:
        assert worker.claim("a", seconds=1, step=step)
        worker.claim("a")  # seen
        worker.clock.now += 2
    assert worker.claim("a", seconds=1, step=steps[-1]) is None
    assert "died 4 times in a row without getting past step 300" in worker.records(["a"])["a"].reason


def test_an_error_of_the_store_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot reach the leases"):
        Leases(tmp_path / "file").claim("a")


def test_of_many_processes_that_write_once_one_is_first(tmp_path):
    contents, start = [], threading.Barrier(8)

    def write(number):
        start.wait()
        contents.append(write_once(tmp_path, "once", str(number)))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(contents) == 8 and len(set(contents)) == 1 and (tmp_path / "once").read_text() == contents[0]


def test_a_damaged_lease_is_named(new_worker, tmp_path):
    worker = new_worker()
    worker.claim("a")
    (tmp_path / "leases" / "a").write_text("{")
    with pytest.raises(UserError, match="lease of cell a is damaged"):
        worker.claim("a")
