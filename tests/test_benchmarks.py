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
FAKE_RATES = {'threads': 2, 'bandwidth cpu': 1e13, 'gemm float32 cpu': 1e11, 'gemm bfloat16 cpu': 2e11, 'exp cpu': 1e9}


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
    assert entry['floor']['seconds'] == pytest.approx(2 * 4 * toy_rows.SIZE / FAKE_RATES['bandwidth cpu'], rel=1e-3)     # the run's rates are used
    assert entry['gap'] == pytest.approx(entry['seconds']['ours'] / entry['floor']['seconds'], rel=1e-2)
    one, code = 4 * toy_rows.SIZE, 2**25                                # ours: one tensor; theirs: six and a sum or two; and pages of code first used
    assert one * .9 < entry['bytes']['ours'] < one * 2 and one * 5 < entry['bytes']['theirs'] < one * 9 + code
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


def test_a_row_below_its_floor_is_rejected(toys, tmp_path):
    "The run goes on with the other rows; a results file with such a row is never written."
    entry = toys[1]['below its floor']
    assert entry['status'] == 'failed' and 'its floor of 1e+06 s is above the measured' in entry['note'] and entry['time_ratio'] is None
    good = toys[1]['twice']
    bad = good | {'floor': good['floor'] | {'seconds': 1.01 * good['seconds']['ours']}}
    with pytest.raises(ValueError, match="row 'twice': its floor of .* is above the measured .*, so no floor; mend the row's floor"):
        cli.write([good, bad], tmp_path/'cpu.json')
    assert not list(tmp_path.iterdir())
    cli.write([good | {'floor': good['floor'] | {'seconds': good['seconds']['ours']}}], tmp_path/'cpu.json')       # reached, not passed


def test_stored_rows_are_above_their_floors():
    for file in cli.NAME.values():
        for entry in cli.read(ROOT/'benchmarks'/'results'/file):
            harness.check_floor(entry)


def test_summary_counts_goals_and_links_to_what_is_missed():
    blank = dict.fromkeys(cli.FIELDS) | {'subject': 'loss', 'status': 'measured', 'work': 'w', 'peer': 'p', 'note': ''}
    rows = [blank | {'row': 'both, met', 'time_ratio': .2, 'goal_time': .3, 'memory_ratio': .1, 'goal_memory': .1},
            blank | {'row': 'late (and large)', 'time_ratio': .4, 'goal_time': .3, 'memory_ratio': .2, 'goal_memory': .1},
            blank | {'row': 'growth', 'more': {'exponent': {'value': 1.5, 'goal': [.85, 1.15]}, 'free': {'value': 1., 'goal': None}}},
            blank | {'row': 'unknown', 'status': 'not measured', 'goal_time': 1.}, blank | {'row': 'no goal', 'time_ratio': 3.}]
    said = report.summary(rows)
    assert said.startswith('**2 goals met, 3 missed, 1 not measured.** Missed: <a href="#loss-late-and-large">late (and large)</a> (time, memory); ')
    page = report.page({'cpu': rows, 'cuda': []}, [])
    first = next(line for line in page.splitlines()[1:] if line and not line.startswith('<!--'))
    assert first + '\n' == said
    for link in ('loss-late-and-large', 'loss-growth'):
        assert page.count(f'href="#{link}"') == page.count(f'id="{link}"') == 1
    assert page.count('<a id=') == 2 and report.summary(rows[:1]) == '**2 goals met, 0 missed, 0 not measured.**\n'


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
    lines = [line for line in page.splitlines() if line.startswith('| ') and 'twice' in line.split('|')[1]]
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
