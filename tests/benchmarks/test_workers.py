"""Jobs in processes of their own, real ones."""

import multiprocessing
import os
import signal
import time

import pytest

from benchmarks.workers import each


def cores(_):
    time.sleep(0.2)  # so that the other process gets a job as well
    return os.getpid(), tuple(sorted(os.sched_getaffinity(0)))


def test_several_have_their_own_cores():
    found = set(each(cores, range(4), workers=2))
    mine = os.sched_getaffinity(0)
    assert os.getpid() not in {pid for pid, _ in found} and len(found) == 2
    shares = [set(share) for _, share in found]
    if len(mine) > 1:
        assert shares[0] | shares[1] == mine and not shares[0] & shares[1]


def test_one_is_this_process():
    assert set(each(cores, [0])) == {(os.getpid(), tuple(os.sched_getaffinity(0)))}


@pytest.mark.parametrize("workers", [1, 2])
def test_deadline(workers):
    assert list(each(cores, [0], workers, time.monotonic() - 1)) == []


def fail(number):
    if number == 1:
        raise ValueError(f"job {number}")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_through(workers):
    with pytest.raises(ValueError, match="job 1"):
        list(each(fail, [0, 1, 2], workers))


def wait(queue_path):
    with open(queue_path, "a") as file:
        print(os.getpid(), file=file)
    time.sleep(60)


def parent(path):
    list(each(wait, [path, path], workers=2))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    path = tmp_path / "pids"
    process = multiprocessing.get_context("spawn").Process(target=parent, args=(path,))
    process.start()
    limit = time.monotonic() + 60
    while not path.exists() or len(path.read_text().split()) < 2:
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for pid in map(int, path.read_text().split()):
        while _lives(pid):
            assert time.monotonic() < limit
            time.sleep(0.05)


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
