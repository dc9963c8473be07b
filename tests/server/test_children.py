"""The operator's processes end with what they have started."""

from __future__ import annotations

import os
import signal

import pytest
from deployed import is_alive, until

from server.processes import Child

STARTS_ANOTHER = "sleep 300 & echo $! >>{}; wait"
STARTS_A_DEAF_ONE = "(trap '' TERM; exec sleep 300) & echo $! >>{}; wait"


@pytest.fixture
def started(tmp_path):
    """Starts a process that starts another; the process, and the numbers of all that it has ever started."""
    children = []

    def start(script=STARTS_ANOTHER, **how) -> tuple[Child, list[int]]:
        told = tmp_path / "started"
        command = ["sh", "-c", script.format(told)]
        child = Child("a process", command, log_file=tmp_path / "log", **how)
        children.append(child)
        child.start()
        until(lambda: told.exists() and told.read_text().endswith("\n"))
        return child, lambda: [int(line) for line in told.read_text().split()]

    yield start
    for child in children:
        child.stop()


@pytest.mark.parametrize("outlived", [False, True])
def test_what_a_killed_process_has_started_ends_unless_it_may_go_on(started, outlived):
    """
    Before the process is started again, and whether or not it may, with the process that is stopped.
    """
    child, others = started(outlived=outlived)
    (before,) = others()
    os.kill(child.pid, signal.SIGKILL)
    until(child.keep_running)
    until(lambda: len(others()) == 2)

    if outlived:
        assert is_alive(before)
    else:
        until(lambda: not is_alive(before), within_s=5)
    child.stop()
    until(lambda: not is_alive(others()[1]), within_s=5)


def test_leftover_that_will_not_end_in_good_order_is_killed_before_the_next_start(started):
    """
    It gets its signal first, and may still hold a port that the next one needs.
    """
    child, others = started(STARTS_A_DEAF_ONE, leftover_signal=signal.SIGTERM)
    (before,) = others()
    os.kill(child.pid, signal.SIGKILL)
    until(child.keep_running)

    until(lambda: not is_alive(before), within_s=5)


def test_what_a_process_has_started_ends_with_it_when_both_were_told_to(started):
    """
    Also if the process itself had ended before.
    """
    child, others = started()
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: not child.is_running)
    child.stop()

    until(lambda: not is_alive(others()[0]), within_s=5)
