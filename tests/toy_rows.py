"""Rows that take milliseconds, for the tests of the benchmark harness."""
import torch

from benchmarks.harness import Row, bandwidth

SIZE = 2**21


def _prepare():
    return torch.ones(SIZE)


def _twice(state):
    return state * 2


def _six_times(state):
    parts = [state * 2 for _ in range(6)]
    return sum(parts) / 6


def _same(ours, theirs):
    torch.testing.assert_close(ours, theirs)


def _never(ours, theirs):
    raise AssertionError('ours and theirs differ by 7')


def _crash(state):
    import os
    os._exit(3)


def _floor(state):
    return 2 * state.nbytes / bandwidth(), 'one reading and one writing'


def _impossible(state):
    return 1e6, 'a million seconds, which nobody waits for'


def _own():
    return {'more': {'exponent': {'value': 1.01, 'goal': [.85, 1.15]}}, 'n': 3}


def _inside():
    return {'more': {'threads': {'value': torch.get_num_threads(), 'goal': None}}}


PAIR = dict(work='2 million numbers', peer='six times the work', prepare=_prepare, ours=_twice, theirs=_six_times, agree=_same)
ROWS = [
    Row('twice', **PAIR, floor=_floor, goal_time=1., goal_memory=.1, pairs=5),
    Row('below its floor', **PAIR, floor=_impossible, pairs=1),
    Row('disagrees', **PAIR | dict(agree=_never)),
    Row('crashes', **PAIR | dict(ours=_crash, agree=_same)),
    Row('of its own kind', work='none', peer='nobody', measure=_own),
    Row('one thread', work='none', peer='nobody', measure=_inside, threads=1),
    Row('no such package', **PAIR, requires='a_package_that_is_not_there'),
    Row('large', **PAIR, full=True),
    Row('on the accelerator', **PAIR, device='cuda'),
]
