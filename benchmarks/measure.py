"""Measure one row in a process of its own: `python -m benchmarks.measure MODULE ROW WHAT FILE`.

WHAT is `time` (both sides, alternately), `ours` or `theirs` (peak memory of that side) or `own` (a row with a `measure` of its own).
The result or the error goes to FILE as JSON, so that whatever the work prints cannot harm it.
"""
import ctypes
import gc
import json
import resource
import statistics
import sys
import traceback
from pathlib import Path

import torch

from benchmarks.harness import Row, load_rows, seconds_of

STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')


def quartiles(values) -> list[float]:
    "First quartile, median and third quartile; of a single value three times itself."
    values = list(values)
    return [values[0]] * 3 if len(values) == 1 else statistics.quantiles(values, n=4, method='inclusive')


def measure_time(row: Row) -> dict:
    "Warm up, compare the results, then time the two sides in turn; the side that goes first changes from pair to pair."
    state = row.prepare()
    row.agree(row.ours(state), row.theirs(state))
    ours, theirs = [], []
    gc.collect()
    gc.disable()
    for pair in range(row.pairs):
        sides = ((ours, row.ours), (theirs, row.theirs))
        for seconds, side in sides if pair % 2 == 0 else sides[::-1]:
            seconds.append(seconds_of(lambda: side(state), row.device))
    gc.enable()
    low, middle, high = quartiles(mine / other for mine, other in zip(ours, theirs))
    found = {'time_ratio': middle, 'spread': [low, high], 'n': row.pairs,
             'seconds': {'ours': statistics.median(ours), 'theirs': statistics.median(theirs)}}
    if row.floor is not None:
        least, says = row.floor(state)
        found |= {'floor': {'seconds': least, 'says': says}, 'gap': found['seconds']['ours'] / least}
    return found


def _status(key):
    "A line of /proc/self/status in bytes."
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(key + ':'))


def _settle():
    "Give freed memory back to the system, so that what is used from here on is seen."
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):           # another C library: the measure is then a lower bound
        pass


def host_peak(work) -> int:
    "Bytes by which resident memory rises above what it is now while `work` runs."
    _settle()
    try:
        CLEAR.write_text('5')                   # the kernel's high-water mark starts anew
        before, mark = _status('VmRSS'), lambda: _status('VmHWM')
    except OSError:                             # not permitted: the mark of the whole life of the process
        unit = 1 if sys.platform == 'darwin' else 1024
        mark = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        before = _status('VmRSS') if STATUS.exists() else mark()
    result = work()
    peak = mark()
    del result
    return max(0, peak - before)


def device_peak(work) -> int:
    "Bytes by which the accelerator's allocated memory rises while `work` runs."
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measure_memory(row: Row, side: str) -> dict:
    "Peak memory of one side, above what the inputs take."
    state = row.prepare()
    peak = device_peak if row.device == 'cuda' else host_peak
    return {'bytes': peak(lambda: getattr(row, side)(state))}


def measure(module: str, name: str, what: str) -> dict:
    "Find the row and measure it."
    row = next(row for _, row in load_rows((module,)) if row.row == name)
    torch.set_num_threads(row.threads)
    if what == 'time':
        return measure_time(row)
    return row.measure() if what == 'own' else measure_memory(row, what)


def main(module, name, what, file):
    "What was found or what went wrong, as JSON."
    try:
        found = measure(module, name, what)
    except Exception as error:                  # whatever it is, the run goes on and the table says it
        traceback.print_exc()
        found = {'error': f'{type(error).__name__}: {error}'}
    Path(file).write_text(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
