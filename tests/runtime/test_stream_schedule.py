"""Schedules against all others and a simulated disk; predictions against the arithmetic they stand for."""

from __future__ import annotations

import itertools
import re

import pytest

from lowbit.errors import RecipeError
from lowbit.runtime.schedule import Prediction, Rates, Schedule, schedule, spread

BLOCKS = (40, 44, 40, 48, 40, 44, 40)
FIXED = 100


def test_places_are_even() -> None:
    for n in range(1, 30):
        for k in range(n + 1):
            places = spread(n, k)
            assert len(set(places)) == k
            assert list(places) == sorted(places)
            if k:
                gaps = {b - a for a, b in itertools.pairwise((*places, places[0] + n))}
                assert max(gaps) - min(gaps) <= 1
                assert 0 <= places[0] <= places[-1] < n


def test_the_memory_is_never_exceeded_and_used_as_far_as_blocks_go() -> None:
    everything = FIXED + sum(BLOCKS)
    for memory in range(FIXED + 2 * 48, everything + 20):
        found = schedule(BLOCKS, memory, FIXED)
        assert found.held <= memory
        assert found.resident + found.moved == sum(BLOCKS)
        fewer = len(found.streamed) - 1
        if fewer >= 0:  # with one block less to read, it would not have fitted
            assert Schedule(BLOCKS, spread(len(BLOCKS), fewer), min(2, fewer), FIXED).held > memory
    assert schedule(BLOCKS, None, FIXED).streamed == ()
    assert schedule(BLOCKS, everything, FIXED).streamed == ()
    assert schedule(BLOCKS, everything - 1, FIXED).streamed != ()


def test_too_little_memory_is_refused_with_the_least_that_works() -> None:
    mib = 1 << 20
    blocks = tuple(size * mib for size in BLOCKS)
    with pytest.raises(RecipeError, match="the smallest is") as refused:
        schedule(blocks, 100 * mib, FIXED * mib)
    (least,) = map(int, re.findall(r"smallest is (\d+)MiB", str(refused.value)))
    assert schedule(blocks, least * mib, FIXED * mib).streamed == tuple(range(len(blocks)))
    with pytest.raises(RecipeError):
        schedule(blocks, least * mib - 1, FIXED * mib)


def simulated(s: Schedule, compute: float, disk: float, passes: int = 40) -> float:
    """Seconds a pass of a disk that reads one block at a time and arithmetic that waits for it."""
    ready: dict[int, float] = {}
    freed = [0.0] * s.buffers
    disk_free = now = 0.0
    turns = len(s.streamed)

    def read(turn: int) -> None:
        nonlocal disk_free
        disk_free = max(disk_free, freed[turn % s.buffers]) + s.blocks[s.streamed[turn % turns]] / disk
        ready[turn] = disk_free

    for turn in range(s.buffers):
        read(turn)
    turn, marks = 0, []
    for _ in range(passes):
        for i, size in enumerate(s.blocks):
            streamed = i in s.streamed
            if streamed:
                now = max(now, ready.pop(turn))
            now += compute * size / s.total
            if streamed:
                freed[turn % s.buffers] = now
                read(turn + s.buffers)
                turn += 1
        marks.append(now)
    return (marks[-1] - marks[passes // 2 - 1]) / (passes // 2)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
@pytest.mark.parametrize("compute", [0.3, 0.9, 1.0, 1.1, 3.0])
def test_the_bound_is_reached(share: float, compute: float) -> None:
    """The slower of the two hides the other, but for a block at the ends; with half a block to spare they agree."""
    blocks = (10,) * 24
    s = schedule(blocks, round(24 * share) * 10 + 20, 0)
    rates = Rates(disk=float(s.moved), compute=compute, decode=1.0)  # one second of reading a pass
    predicted = Prediction(s, rates, 0, 0)
    assert predicted.token == max(compute, 1.0)
    seconds = simulated(s, compute, rates.disk)
    assert predicted.token <= seconds * (1 + 1e-9)
    assert seconds <= predicted.token * (1.10 if len(s.streamed) > 4 else 1.25)


def test_a_cache_of_what_was_used_last_reads_everything_at_every_pass() -> None:
    """Why the choice is made once: with four fifths of the blocks in an LRU cache, none of them is ever found there."""
    blocks, room, cache, missed = range(20), 16, dict[int, None](), 0
    for _ in range(10):
        for block in blocks:
            missed += block not in cache
            cache.pop(block, None)
            cache[block] = None
            if len(cache) > room:
                del cache[next(iter(cache))]
    assert missed == 10 * len(blocks)
    fixed = schedule((1,) * 20, 18, 0)
    assert fixed.moved == 4


def test_break_even_is_where_both_ways_take_the_same_time() -> None:
    s = schedule((300, 300), None, 0)
    for decode, pays in ((0.99, False), (1.01, True)):
        p = Prediction(s, Rates(disk=100.0, compute=1.0, decode=0.0), 0, sixteen=2400)
        assert p.ratio == 4
        rate = decode * p.break_even
        plain, coded = 2400 / 100, 600 / 100 + 2400 / rate
        assert (coded < plain) is pays
    assert Prediction(s, Rates(100.0, 1.0, 1.0), 0, sixteen=600).break_even == float("inf")


def test_loading_reads_what_stays_and_the_first_blocks() -> None:
    s = schedule((10,) * 10, 60 + 20, 0)
    p = Prediction(s, Rates(disk=5.0, compute=1.0, decode=1.0), outside=30, sixteen=0)
    assert (len(s.streamed), p.reading, p.load) == (4, 8.0, (30 + 60 + 20) / 5)
