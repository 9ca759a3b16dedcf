"""Leases: one holder at a time, whatever dies, sleeps or loses an answer."""

import threading
import time

import pytest

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.lease import Board, LeaseLost, write_once


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def board(tmp_path):
    """Makes boards on one directory, each of a worker with a clock of its own."""

    def make():
        clock = Clock()
        made = Board(tmp_path / "leases", clock)
        made.clock = clock
        return made

    return make


def test_of_many_workers_one_gets_a_cell(board):
    boards, won, start = [board() for _ in range(8)], [], threading.Barrier(8)

    def claim(worker):
        start.wait()
        for cell in map(str, range(20)):
            if lease := worker.claim(cell):
                won.append((cell, lease))

    threads = [threading.Thread(target=claim, args=(worker,)) for worker in boards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(cell) for cell, _ in won) == list(range(20))
    assert set(boards[0].records(list(map(str, range(20))))) == set(map(str, range(20)))


def test_a_released_cell_is_free_and_a_failed_one_only_for_who_asks(board):
    first, second = board(), board()
    first.claim("a").release()
    assert not first.records(["a"])
    second.claim("a").fail("out of memory")
    record = first.records(["a"])["a"]
    assert (record.state, record.reason) == ("failed", "out of memory")
    assert first.claim("a") is None
    first.clock.now = 1e6
    assert first.claim("a") is None, "nor does a failure expire"
    again = first.claim("a", failed=True)
    assert again.starts == 2 and first.records(["a"])["a"].state == "running"


def test_a_lease_that_is_not_renewed_is_taken_over_once_it_was_seen_for_long_enough(board):
    holder, other = board(), board()
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
        lease._board.clock.now += 1000  # it slept
        with pytest.raises(LeaseLost, match="cell a was taken over"):
            use()
    taken.confirm()  # nothing that the sleeper did has touched it
    assert other.records(["a"])["a"].state == "running"


def test_who_has_slept_asks_before_the_next_write_and_goes_on_if_nobody_came(board):
    lease = board().claim("a", seconds=60)
    before = lease._generation
    lease.check()
    assert lease._generation == before, "a fresh lease asks nobody"
    lease._board.clock.now += 61
    lease.check()
    assert lease._generation != before


def test_a_lost_answer_is_not_a_lost_lease(board):
    """A write that arrived, but whose answer did not, leaves a generation that the holder does not know."""
    worker = board()
    lease = worker.claim("a")
    known = lease._generation
    lease.confirm()
    lease._generation = known
    lease.confirm()
    assert not lease.lost and worker.records(["a"])["a"].token == lease._record.token


def test_it_is_renewed_in_the_background(board):
    holder, other = board(), board()
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


def test_what_was_given_back_is_not_renewed(board):
    worker = board()
    with worker.claim("a", seconds=0.05) as lease:
        lease.release()
        time.sleep(0.2)
    assert not worker.records(["a"])


def test_a_finished_cell_is_nobodys(board):
    worker = board()
    worker.claim("a").done()
    worker.clock.now = 1e6
    assert worker.claim("a", failed=True) is None
    assert worker.records(["a", "b"])["a"].state == "done"


def test_a_cell_that_kills_its_workers_has_failed(board):
    """But not one that gets further each time, as on machines that are taken away again and again."""
    worker = board()

    def die(step):
        lease = worker.claim("a", seconds=1, step=step)
        worker.claim("a")  # seen
        worker.clock.now += 2
        return lease

    assert all(die(step) for step in (0, 0, 0, 0, 10, 20, 20, 20, 20))
    assert worker.claim("a", step=20) is None
    record = worker.records(["a"])["a"]
    assert record.state == "failed" and "died 4 times in a row without getting past step 20" in record.reason
    assert worker.claim("a", step=20, failed=True).starts == 11


@pytest.mark.parametrize("steps", [(300, 299, 300, 299, 300), (300, 100, 200, 299, 300)])
def test_nor_does_it_get_further_by_falling_back(board, steps):
    """Where its workers die varies by some steps, and none gets further than the first."""
    worker = board()
    for step in steps[:-1]:
        assert worker.claim("a", seconds=1, step=step)
        worker.claim("a")  # seen
        worker.clock.now += 2
    assert worker.claim("a", seconds=1, step=steps[-1]) is None
    assert "died 4 times in a row without getting past step 300" in worker.records(["a"])["a"].reason


def test_trouble_of_the_store_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot reach the leases"):
        Board(tmp_path / "file").claim("a")


def test_of_many_who_write_once_one_is_first(tmp_path):
    found, start = [], threading.Barrier(8)

    def write(number):
        start.wait()
        found.append(write_once(tmp_path, "once", str(number)))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and (tmp_path / "once").read_text() == found[0]


def test_a_damaged_lease_is_named(board, tmp_path):
    worker = board()
    worker.claim("a")
    (tmp_path / "leases" / "a").write_text("{")
    with pytest.raises(UserError, match="lease of cell a is damaged"):
        worker.claim("a")
