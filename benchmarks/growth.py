"""How the cost of the loss and of the search grows with each size: the exponent of a power law, 1 where the cost is linear.

The sizes begin where the fixed cost of a call no longer counts. Each row varies one size and keeps the others.
"""
import numpy as np

from benchmarks.harness import Row
from benchmarks.loss import loss_seconds
from benchmarks.search import search_seconds

GOAL = [.85, 1.15]


def power_law(sizes, seconds) -> tuple[float, float]:
    "Exponent and factor of seconds = factor * size ** exponent, by least squares of the logarithms."
    exponent, height = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(exponent), float(np.exp(height))


def growth(cost, sizes, axis) -> dict:
    "Seconds at each size, their power law, and the exponent beside the goal."
    seconds = [cost(size) for size in sizes]
    exponent, factor = power_law(sizes, seconds)
    return {'more': {'exponent': {'value': exponent, 'goal': GOAL}}, 'n': len(sizes), 'axis': axis,
            'points': [list(point) for point in zip(sizes, seconds)], 'fit': [exponent, factor]}


def _row(name, work, cost, sizes, axis):
    return Row(name, work, 'its own cost at other sizes', measure=lambda: growth(cost, sizes, axis))


ROWS = [
    _row('loss against N', '1000 classes, 2 + 6 views, float32, forward and backward',
         lambda n: loss_seconds(n, 1000, 8), (1024, 2048, 4096, 8192), 'images N'),
    _row('loss against C', '512 images, 2 + 6 views, float32, forward and backward',
         lambda c: loss_seconds(512, c, 8), (2000, 4000, 8000, 16000), 'classes C'),
    _row('loss against V', '512 images, 2000 classes, 2 global views, float32, forward and backward',
         lambda v: loss_seconds(512, 2000, v), (8, 16, 32, 64), 'views V'),
    _row('search against Q', '262,144 keys of 128 numbers, k = 2, float32',
         lambda queries: search_seconds(queries, 262_144, 128), (2048, 4096, 8192, 16384), 'queries Q'),
    _row('search against keys', '2048 queries of 128 numbers, k = 2, float32',
         lambda keys: search_seconds(2048, keys, 128), (131_072, 262_144, 524_288, 1_048_576), 'keys'),
]
