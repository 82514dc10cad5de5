"""What a benchmark row is, where the rows are, and the rates of this machine from which floors are reckoned.

A row names its work, its peer and its goals, and brings the functions that do the work. `benchmarks.measure` measures one row in
processes of their own, `benchmarks.report` makes the table and the plots, `python -m benchmarks` runs it all.
"""
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = tuple(name for name in ('loss', 'optimizer', 'search', 'views', 'kmeans', 'growth')
                 if Path(__file__).with_name(f'{name}.py').exists())
RATES = 'SELFCLASS_BENCH_RATES'                # rates that the run has measured, handed to its processes
ISA = ('avx2', 'avx512f', 'avx512_bf16', 'avx512_vnni', 'amx_bf16', 'amx_int8', 'asimd', 'bf16', 'sve')


@dataclass(frozen=True)
class Row:
    """One line of the table: a piece of work done by selfclass and by a peer.

    Parameters
    ----------
    row, work, peer : str    short name; what is done, with sizes; who else does it ('written from the paper' where it is no package)
    prepare : () -> state    makes the inputs, seeded, and imports what both sides need
    ours, theirs : state -> result        the two sides; they must not change the state
    agree : (ours, theirs) -> None        raises AssertionError saying how the two results differ
    floor : state -> (seconds, str)       least time the work can take here, and how it was reckoned
    goal_time, goal_memory : float        largest ratio ours/theirs that is wanted; None where none is
    pairs : int              measured alternations of the two sides, after one warm-up each
    device : str             'cpu' or 'cuda'
    full : bool              measured under --full only
    requires : str           module that must be importable, else the row says 'not measured'
    threads : int            threads of the process
    measure : () -> dict     measures a row of another kind in a process of its own: any fields of the JSON, and under `more`
                             {name: {'value': float, 'goal': largest value or [least, largest] or None}}
    """
    row: str
    work: str
    peer: str
    prepare: Callable | None = None
    ours: Callable | None = None
    theirs: Callable | None = None
    agree: Callable | None = None
    floor: Callable | None = None
    goal_time: float | None = None
    goal_memory: float | None = None
    pairs: int = 7
    device: str = 'cpu'
    full: bool = False
    requires: str | None = None
    threads: int = 2
    measure: Callable | None = None

    def __post_init__(self):
        sides = (self.prepare, self.ours, self.theirs, self.agree)
        if self.measure is None and None in sides:
            raise TypeError(f"row '{self.row}' needs prepare, ours, theirs and agree, or measure")
        if self.measure is not None and any(sides):
            raise TypeError(f"row '{self.row}' has measure and the sides of a pair; leave out one")
        if self.device not in ('cpu', 'cuda') or self.pairs < 1 or self.threads < 1:
            raise TypeError(f"row '{self.row}': device is cpu or cuda, pairs and threads are 1 or more")


def check_floor(entry: dict):
    """Refuse a measured row that is faster than its floor: then one of the two is wrong, and most likely the reckoning of the floor.

    Parameters
    ----------
    entry : dict     of a results file; rows without a floor or without a time of ours pass

    Raises
    ------
    ValueError       the floor is above the measured time
    """
    floor, ours = (entry['floor'] or {}).get('seconds'), (entry['seconds'] or {}).get('ours')
    if floor is not None and ours is not None and floor > ours:
        raise ValueError(f"row '{entry['row']}': its floor of {floor:.4g} s is above the measured {ours:.4g} s, so no floor; "
                         f"mend the row's floor ({entry['floor']['says']}) and measure it again")


def load_rows(modules=tuple(f'benchmarks.{subject}' for subject in SUBJECTS)) -> list[tuple[str, Row]]:
    "(module, row) of every row in the order of the table; two rows of one module must not have the same name."
    rows = [(module, row) for module in modules for row in importlib.import_module(module).ROWS]
    names = [(module, row.row) for module, row in rows]
    if len(set(names)) < len(names):
        raise TypeError(f'rows with the same name: {sorted({name for name in names if names.count(name) > 1})}')
    return rows


# ---- rates of this machine -------------------------------------------------------------------------------------------

def synchronise(device: str):
    "Wait for the accelerator; on CPU everything is done when the call returns."
    if device == 'cuda':
        torch.cuda.synchronize()


def seconds_of(work: Callable, device: str = 'cpu') -> float:
    "Wall time of one call; the result is dropped after the clock has stopped."
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    stop = time.perf_counter()
    del result
    return stop - start


def _best(work, device, times=7):
    "Shortest of several calls after a warm-up: a rate is what the machine can do, not what it did on average."
    work()
    return min(seconds_of(work, device) for _ in range(times))


def _rate(measured):
    "Make a rate known to a run: measured once for a number of threads, then read from the environment."
    @functools.cache
    def rate(key, threads):
        known = json.loads(os.environ.get(RATES, '{}'))
        return known[key] if known.get('threads') == threads and key in known else measured(*key.split()[1:])
    return rate


@_rate
def _bandwidth(device):
    source = torch.ones(2**27 if device == 'cpu' else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_best(lambda: target.copy_(source), device, 4), _best(lambda: target.mul_(1.), device, 4))


@_rate
def _gemm_rate(dtype, device):
    size = 2048 if device == 'cpu' else 8192
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


@_rate
def _exp_rate(device):
    values = torch.randn(2**18 if device == 'cpu' else 2**27, device=device)
    result = torch.empty_like(values)
    return values.numel() / _best(lambda: torch.exp(values, out=result), device, times=30)


def bandwidth(device: str = 'cpu') -> float:
    """Bytes a second, reading and writing both counted, of 512 MB (1 GB on a GPU): the faster of a copy and a scaling in place.

    On many CPUs a copy also reads the lines that it is about to overwrite, which a scaling in place has to read anyway."""
    return _bandwidth(f'bandwidth {device}', torch.get_num_threads())


def gemm_rate(dtype: torch.dtype | str = torch.float32, device: str = 'cpu') -> float:
    "Floating-point operations a second of a square matrix product (an addition and a multiplication are two)."
    return _gemm_rate(f"gemm {str(dtype).removeprefix('torch.')} {device}", torch.get_num_threads())


def exp_rate(device: str = 'cpu') -> float:
    "Exponentials a second of float32 values, in the cache on CPU."
    return _exp_rate(f'exp {device}', torch.get_num_threads())


def rates(device: str = 'cpu', threads: int = 2) -> dict:
    "All rates by the keys under which they are handed on."
    torch.set_num_threads(threads)
    return {'threads': threads, f'bandwidth {device}': bandwidth(device),
            f'gemm float32 {device}': gemm_rate(torch.float32, device),
            f'gemm bfloat16 {device}': gemm_rate(torch.bfloat16, device), f'exp {device}': exp_rate(device)}


# ---- what stands beside each figure ----------------------------------------------------------------------------------

def _cpu_facts():
    "Model name and instruction sets that matter, from /proc/cpuinfo where there is one."
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    facts = {key.strip().lower(): value for key, _, value in (line.partition(':') for line in lines)}
    flags = (facts.get('flags') or facts.get('features') or '').split()
    return facts.get('model name', platform.machine()).strip(), [flag for flag in ISA if flag in flags]


def hardware(device: str = 'cpu', measured_rates: dict | None = None) -> dict:
    "The machine: processor, cores, instruction sets, accelerator, and its rates if they have been measured."
    model, flags = _cpu_facts()
    facts = {'cpu': model, 'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
             'flags': flags, 'rates': measured_rates or {}}
    return facts | ({'gpu': torch.cuda.get_device_name()} if device == 'cuda' and torch.cuda.is_available() else {})


def versions(*modules: str) -> dict:
    "Versions of Python, torch, selfclass and of the packages that hold the modules named, where installed."
    held_by = importlib.metadata.packages_distributions() | {'selfclass': ['selfclass']}
    found = {'python': platform.python_version(), 'torch': torch.__version__}
    for name in ('selfclass', *modules):
        try:
            found[name] = importlib.metadata.version(held_by.get(name, [name])[0])
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
