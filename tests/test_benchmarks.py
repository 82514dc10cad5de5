"""The benchmark harness, on toy rows, and the shape of the real rows. No speed is asserted."""
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, python

from benchmarks import __main__ as cli
from benchmarks import harness, measure, report

import toy_rows

TOYS = [('toy_rows', row) for row in toy_rows.ROWS]
FAKE_RATES = {'threads': 2, 'bandwidth cpu': 1e10, 'gemm float32 cpu': 1e11, 'gemm bfloat16 cpu': 2e11, 'exp cpu': 1e9}


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    "Everything that a run of the toy rows leaves: exit code, entries, folder."
    folder = tmp_path_factory.mktemp('toys')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(Path(__file__).parent))
        patch.setenv(harness.RATES, '')
        patch.setattr(cli.run, '__defaults__', (lambda device: FAKE_RATES,))
        code = cli.main([], folder/'results', folder/'docs', TOYS)
    return code, {entry['row']: entry for entry in cli.read(folder/'results'/'cpu.json')}, folder


def test_ratios_are_sane(toys):
    entry = toys[1]['twice']
    assert entry['status'] == 'measured' and entry['n'] == 5
    assert 0 < entry['spread'][0] <= entry['time_ratio'] <= entry['spread'][1]
    assert 0 < entry['seconds']['ours'] and 0 < entry['seconds']['theirs']
    assert entry['floor']['seconds'] == pytest.approx(2 * 4 * toy_rows.SIZE / 1e10, rel=1e-3)     # the run's rates are used
    assert entry['gap'] == pytest.approx(entry['seconds']['ours'] / entry['floor']['seconds'], rel=1e-2)
    one = 4 * toy_rows.SIZE                                             # ours: one tensor; theirs: six and a sum or two
    assert one * .9 < entry['bytes']['ours'] < one * 2 and one * 5 < entry['bytes']['theirs'] < one * 10
    assert entry['memory_ratio'] == pytest.approx(entry['bytes']['ours'] / entry['bytes']['theirs'], rel=1e-2)


def test_failures_are_reported_and_do_not_stop_the_run(toys):
    code, entries, _ = toys
    assert code == 1
    assert entries['disagrees']['status'] == 'failed'
    assert entries['disagrees']['note'] == 'time: AssertionError: ours and theirs differ by 7'
    assert 'process ended with code 3' in entries['crashes']['note'] and entries['crashes']['time_ratio'] is None
    assert entries['of its own kind']['more']['exponent'] == {'value': 1.01, 'goal': [.85, 1.15]}


def test_rows_that_were_not_measured_say_why(toys):
    code, entries, folder = toys
    assert 'a_package_that_is_not_there' in entries['no such package']['note']
    assert entries['large']['note'] == 'large: under --full only'
    assert {entries[name]['status'] for name in ('no such package', 'large')} == {'not measured'}
    assert 'on the accelerator' not in entries


def test_threads_of_a_row(toys):
    assert toys[1]['one thread']['more']['threads']['value'] == 1


def test_schema_and_order(toys):
    assert list(toys[1]) == [row.row for row in toy_rows.ROWS if row.device == 'cpu']
    for entry in toys[1].values():
        assert list(entry) == list(cli.FIELDS) and isinstance(entry['note'], str) and entry['work'] and entry['peer']
        assert entry['status'] in ('measured', 'failed', 'not measured')
        if entry['status'] == 'measured':
            assert entry['hardware']['cores'] >= 1 and entry['versions']['torch'] == torch.__version__


def test_page_is_that_of_the_results(toys):
    _, entries, folder = toys
    page = (folder/'docs'/'benchmarks.md').read_text(encoding='utf-8')
    both = {'cpu': list(entries.values()), 'cuda': [cli.blank('toy_rows', TOYS[-1][1])]}
    pictures = [path.name for path in (folder/'docs'/'images').iterdir()]
    assert page == report.page(both, pictures) and pictures == ['benchmarks.png']
    assert (folder/'docs'/'images'/'benchmarks.png').stat().st_size < 200_000
    lines = [line for line in page.splitlines() if line.startswith('| twice')]
    assert report.number(entries['twice']['time_ratio']) in lines[0]
    assert page.count('not measured') >= 3 and 'failed' in page


def test_only_renews_the_rows_it_names(toys, tmp_path, monkeypatch):
    old = [entry | {'note': 'old'} for entry in toys[1].values()]
    cli.write(old, tmp_path/'results'/'cpu.json')
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent))
    monkeypatch.setenv(harness.RATES, '')
    monkeypatch.setattr(cli.run, '__defaults__', (lambda device: FAKE_RATES,))
    assert cli.main(['--only', 'OWN kind'], tmp_path/'results', tmp_path/'docs', TOYS) == 0
    new = cli.read(tmp_path/'results'/'cpu.json')
    assert [entry['row'] for entry in new if entry['note'] != 'old' and entry['hardware']] == ['of its own kind']
    assert [entry['row'] for entry in new] == [entry['row'] for entry in old]
    assert cli.main(['--only', 'nonsense'], tmp_path/'results', tmp_path/'docs', TOYS) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu_is_one_line_and_spoils_nothing(tmp_path, capsys):
    assert cli.main(['--device', 'cuda'], tmp_path/'results', tmp_path/'docs', TOYS) == 1
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1 and 'no CUDA device found' in said.err
    file = tmp_path/'results'/'gpu.json'
    assert [(entry['row'], entry['status']) for entry in cli.read(file)] == [('on the accelerator', 'not measured')]
    measured = [entry | {'status': 'measured', 'hardware': {'cpu': 'x', 'cores': 1, 'flags': [], 'rates': {}}, 'note': ''}
                for entry in cli.read(file)]
    cli.write(measured, file)
    cli.main(['--device', 'cuda'], tmp_path/'results', tmp_path/'docs', TOYS)
    assert cli.read(file) == measured


def test_quartiles():
    assert measure.quartiles([.5]) == [.5] * 3
    assert measure.quartiles([1., 2., 3., 4., 5.]) == [2., 3., 4.] and statistics.median([1., 2., 3., 4., 5.]) == 3.


def test_peak_sees_what_comes_and_goes():
    if not measure.STATUS.exists() or not os.access(measure.CLEAR, os.W_OK):
        pytest.skip('no peak that can be reset on this system')
    assert measure.host_peak(lambda: torch.ones(2**24)[:1].clone()) == pytest.approx(2**26, rel=.2)


def test_rates_are_plausible_and_read_from_the_run(monkeypatch):
    harness._exp_rate.cache_clear()
    assert harness.exp_rate() > 1e6
    harness._bandwidth.cache_clear()
    monkeypatch.setenv(harness.RATES, json.dumps({'threads': torch.get_num_threads(), 'bandwidth cpu': 42.}))
    assert harness.bandwidth() == 42.
    harness._bandwidth.cache_clear()


def test_a_row_is_a_pair_or_has_a_measure_of_its_own():
    row = toy_rows.ROWS[0]
    for wrong in (dict(ours=None), dict(measure=dict), dict(device='tpu'), dict(pairs=0)):
        with pytest.raises(TypeError, match='twice'):
            replace(row, **wrong)


def test_words():
    assert [report.number(x) for x in (None, 1234.5, 12.34, 1.234, .1234, .01234, .0001234)] == \
        ['–', '1234', '12.3', '1.23', '0.12', '0.0123', '0.000123']
    assert [report.duration(x) for x in (None, 2, .0123, 4.56e-5)] == ['–', '2 s', '12.3 ms', '45.6 µs']
    assert report.size(2.5e9) == '2.5 GB'
    assert report.is_met(1.1, [.85, 1.15]) and not report.is_met(1.2, [.85, 1.15]) and report.is_met(.2, .25)
    assert 'missed' in report.verdict(.3, .25) and 'met' in report.verdict(.25, .25) and report.verdict(1, None) == '–'


# ---- the real rows ---------------------------------------------------------------------------------------------------

def test_every_subject_has_rows():
    assert harness.SUBJECTS == ('loss', 'optimizer', 'search', 'views', 'kmeans', 'growth')
    rows = harness.load_rows()
    assert {module for module, _ in rows} == {f'benchmarks.{subject}' for subject in harness.SUBJECTS}
    for _, row in rows:
        assert len(row.row) <= 60 and row.work and row.peer
        assert row.goal_time is None or row.goal_time > 0
    assert {row.device for _, row in rows} == {'cpu', 'cuda'}


def test_the_documentation_is_that_of_the_results():
    rows = harness.load_rows()
    both = {device: cli.merge([(m, r) for m, r in rows if r.device == device], cli.read(ROOT/'benchmarks'/'results'/file))
            for device, file in cli.NAME.items()}
    pictures = {path.name for path in (ROOT/'docs'/'images').iterdir()}
    assert (ROOT/'docs'/'benchmarks.md').read_text(encoding='utf-8') == report.page(both, pictures)
    for name in pictures & {'benchmarks.png', 'benchmarks-gpu.png', 'growth.png'}:
        assert (ROOT/'docs'/'images'/name).stat().st_size < 200_000


def test_command_line_help():
    done = python('-m', 'benchmarks', '--help')
    assert done.returncode == 0 and '--device' in done.stdout
