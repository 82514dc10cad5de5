"""Measure the rows beside their peers; write benchmarks/results/{cpu,gpu}.json after each, then docs/benchmarks.md with its plots."""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.harness import RATES, ROOT, check_floor, hardware, load_rows, rates, versions

SECONDS = 1800                                  # a process of a row that takes longer has failed
SMALL = 4 * 2**20                               # peaks below this are noise: no ratio
FIELDS = ('subject', 'row', 'work', 'peer', 'status', 'time_ratio', 'memory_ratio', 'spread', 'goal_time', 'goal_memory',
          'floor', 'seconds', 'bytes', 'gap', 'n', 'more', 'axis', 'points', 'fit', 'hardware', 'versions', 'note')
NAME = {'cpu': 'cpu.json', 'cuda': 'gpu.json'}


def subject_of(module) -> str:
    "Last part of a module's name."
    return module.rpartition('.')[2]


def blank(module, row) -> dict:
    "Entry of a row that has not been measured."
    why = 'no accelerator was at hand' if row.device == 'cuda' else 'large: under --full only' if row.full else 'no run yet'
    known = {'subject': subject_of(module), 'row': row.row, 'work': row.work, 'peer': row.peer, 'status': 'not measured',
             'goal_time': row.goal_time, 'goal_memory': row.goal_memory, 'note': why}
    return dict.fromkeys(FIELDS) | known


def in_process(module, row, what) -> dict:
    "Measure in a fresh process; its result, or {'error': why there is none, 'log': what the process said}."
    more = {name: str(row.threads) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')}
    more['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'found.json'
        try:
            done = subprocess.run([sys.executable, '-m', 'benchmarks.measure', module, row.row, what, str(file)],
                                  capture_output=True, text=True, errors='replace', timeout=SECONDS, env=os.environ | more)
        except subprocess.TimeoutExpired:
            return {'error': f'took longer than {SECONDS} s', 'log': ''}
        found = json.loads(file.read_text()) if file.exists() else {'error': f'process ended with code {done.returncode}'}
        return found | ({'log': done.stderr} if 'error' in found else {})


def measure_row(module, row) -> dict:
    "All figures of a row; the first error ends it."
    if row.requires and importlib.util.find_spec(row.requires) is None:
        return {'status': 'not measured', 'note': f"needs the package {row.requires} (extra 'bench')"}
    parts = {}
    for what in ('own',) if row.measure else ('time', 'ours', 'theirs'):
        parts[what] = in_process(module, row, what)
        if 'error' in parts[what]:
            return {'status': 'failed', 'note': f"{what}: {parts[what]['error']}", 'log': parts[what]['log']}
    if row.measure:
        return {'status': 'measured', 'note': ''} | parts['own']
    peak = {side: parts[side]['bytes'] for side in ('ours', 'theirs')}
    ratio = peak['ours'] / peak['theirs'] if peak['theirs'] >= SMALL else None
    found = parts['time'] | {'status': 'measured', 'note': '', 'bytes': peak, 'memory_ratio': ratio}
    try:
        check_floor({'row': row.row, 'floor': None} | found)
    except ValueError as error:                 # the other rows of the run are not to be lost
        return {'status': 'failed', 'note': str(error), 'log': ''}
    return found


def read(file) -> list[dict]:
    "Entries of a results file; none where there is no file."
    return json.loads(Path(file).read_text(encoding='utf-8')) if Path(file).exists() else []


def merge(rows, *lists) -> list[dict]:
    "One entry for each row, in the order of the rows: the newest that says something, else a blank one."
    known = {(entry['subject'], entry['row']): entry for entries in lists for entry in entries}
    found = [known.get((subject_of(module), row.row)) for module, row in rows]
    return [entry if entry and entry['hardware'] else blank(*row) for entry, row in zip(found, rows)]


def rounded(value):
    "Six significant digits: fewer could round a missed goal into a met one."
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return float(f'{value:.6g}') if isinstance(value, float) else value


def write(entries, file):
    "Readable JSON in one stroke: a run that is stopped leaves a whole file. ValueError, and nothing written, where a floor is above the measured time."
    for entry in entries:
        check_floor(entry)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix('.part')
    part.write_text(json.dumps(rounded(entries), indent=1) + '\n', encoding='utf-8')
    part.replace(file)


def run(rows, chosen, device, results, rates_of=rates) -> int:
    "Measure the chosen rows one after the other, write each result at once; how many have failed."
    file, failed = Path(results)/NAME[device], 0
    measured_rates = rates_of(device)
    os.environ[RATES] = json.dumps(measured_rates)
    for number, (module, row) in enumerate(chosen, 1):
        print(f'[{number}/{len(chosen)}] {subject_of(module)}: {row.row} ... ', end='', flush=True)
        start = time.perf_counter()
        found = measure_row(module, row)
        log = found.pop('log', '')
        entry = blank(module, row) | found | {'hardware': hardware(device, measured_rates),
                                              'versions': versions(*filter(None, [row.requires]))}
        write(merge(rows, read(file), [entry]), file)
        print(f'{report.in_words(entry)} [{time.perf_counter() - start:.0f} s]', flush=True)
        if entry['status'] == 'failed':
            failed += 1
            print(log.rstrip()[-2000:], file=sys.stderr, flush=True)
    return failed


def arguments(argv):
    "The command line."
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--full', action='store_true', help='the large sizes too')
    parser.add_argument('--only', metavar='TEXT', default='', help="rows whose 'subject: name' contains TEXT; the others stay as they are")
    parser.add_argument('--docs', action='store_true', help='measure nothing: write the table and the plots from the results')
    return parser.parse_args(argv)


def choose(rows, only, full):
    "Rows of this run."
    return [(module, row) for module, row in rows
            if (full or not row.full) and only.lower() in f'{subject_of(module)}: {row.row}'.lower()]


def main(argv=None, results=ROOT/'benchmarks'/'results', docs=ROOT/'docs', everything=None) -> int:
    "Exit code: 0, or 1 where a row failed or nothing could be measured."
    options = arguments(argv)
    everything = load_rows() if everything is None else everything
    by_device = {device: [(module, row) for module, row in everything if row.device == device] for device in NAME}
    rows, file = by_device[options.device], Path(results)/NAME[options.device]
    chosen, failed, found_none = choose(rows, options.only, options.full), 0, ''
    if options.device == 'cuda' and not torch.cuda.is_available() and not options.docs:
        write(merge(rows, read(file)), file)    # what was measured elsewhere stays
        found_none = 'no CUDA device found, nothing measured; run `make bench-gpu` on a machine with one'
    elif not chosen and not options.docs:
        found_none = f"no row contains '{options.only}'; rows: " + '; '.join(f'{subject_of(m)}: {row.row}' for m, row in rows)
    elif not options.docs:
        failed = run(rows, chosen, options.device, results)
    both = {device: merge(by_device[device], read(Path(results)/NAME[device])) for device in NAME}
    report.write_docs(both, docs)
    if found_none or failed:
        print(found_none or f'{failed} of {len(chosen)} rows failed; the notes in {file.name} say why', file=sys.stderr)
    return int(bool(found_none or failed))


if __name__ == '__main__':
    sys.exit(main())
