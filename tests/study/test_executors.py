from __future__ import annotations

import os
import threading
import time

import pytest

from lowbit.errors import RecipeError, StudyError
from lowbit.study.executors import inline, processes


def _raise() -> None:
    raise RecipeError("bad", where="here", fix="that")


def test_inline_runs_here_and_lets_an_interrupt_through() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with inline() as executor:
        (lane,) = executor.lanes
        assert lane.submit(threading.get_ident).result() == threading.get_ident()
        assert isinstance(lane.submit(_raise).exception(), RecipeError)
        with pytest.raises(KeyboardInterrupt):
            lane.submit(interrupt)


def test_a_process_lane_keeps_its_process_survives_its_death_and_its_own_environment() -> None:
    with processes(2, [{"LANE": "0"}, {"LANE": "1", "OMP_NUM_THREADS": "7"}]) as executor:
        first, second = executor.lanes
        futures = [lane.submit(os.getenv, "LANE") for lane in executor.lanes]
        assert [f.result(20) for f in futures] == ["0", "1"]
        assert "LANE" not in os.environ
        assert second.submit(os.getenv, "OMP_NUM_THREADS").result(20) == "7"
        pid = first.submit(os.getpid).result(20)
        assert first.submit(os.getpid).result(20) == pid != os.getpid()
        error = first.submit(_raise).exception(20)
        assert isinstance(error, RecipeError)
        assert (error.what, error.where, error.fix) == ("bad", "here", "that")
        assert first.submit(threading.Lock).exception(20) is not None  # an answer that does not cross processes
        died = second.submit(os.abort).exception(20)
        assert isinstance(died, StudyError)
        assert "SIGABRT" in str(died)
        assert second.submit(os.getenv, "LANE").result(20) == "1"
        slow = second.submit(time.sleep, 60)
        second.kill()
        assert isinstance(slow.exception(20), StudyError)


def test_a_wrong_number_of_processes_is_refused() -> None:
    with pytest.raises(StudyError):
        processes(0)
    with pytest.raises(StudyError):
        processes(2, [{}])
