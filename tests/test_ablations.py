"""Grids of ablations: every row is one of a published table and fits the recipes; runs go through DVC's queue; missing ones are gaps."""
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, python
from selfclass.ablations import Experiment, choose_grids, collect_grid, main, plan, queue_states, queue_words, read_grids, run_scores, table_csv, table_html, table_markdown
from selfclass.core import read_yaml
from selfclass.errors import ParamsError
from selfclass.published import published
from selfclass.run import read_params, with_settings

BASE, GRIDS = read_grids()
PARAMS = {'digits': read_params(ROOT/'conf'/'digits.yaml'), 'imagenet': read_params(ROOT/'conf'/'imagenet-100ep.yaml')}
OWN = [f'self-classifier/{n}' for n in range(5, 12)]


@pytest.mark.parametrize('size', PARAMS)
def test_every_row_of_the_papers_own_tables_has_a_run(size):
    todo = plan([GRIDS[name] for name in OWN], BASE, PARAMS[size], size)
    assert len(todo.rows) == 33 and all(isinstance(run, Experiment) for run in todo.rows.values()) and not todo.skipped
    assert len({run.name for run in todo.experiments}) == len(todo.experiments)


@pytest.mark.parametrize('name', GRIDS)
def test_rows_are_those_of_the_published_table(name):
    grid = GRIDS[name]
    if grid.table:
        rows = [tuple(row.labels[key] for key in grid.rows[0].label) for row in published(grid.table).rows]
        assert [tuple(row.label.values()) for row in grid.rows] == rows, 'one row each, in the order of the paper'
    assert all(set(row.settings) <= set(BASE) for row in grid.rows)


def test_the_siblings_tables_and_figures_have_grids():
    assert {'sela/1', 'scan/1', 'scan/2', 'scan/fig7', 'scan/fig8', 'kmeans/fig2a', 'kmeans/fig2b'} == {name for name in GRIDS if not name.startswith('self-classifier/')}
    assert all(GRIDS[name].needs for name in GRIDS if not name.startswith('self-classifier/'))


def test_imagenet_rows_hold_the_published_settings():
    "Labels of Tables 7-9 and 11 are the settings themselves."
    set_by = lambda name: [(row.label, with_settings(PARAMS['imagenet'], row.settings['imagenet'])['methods']['selfclassifier'],
                            with_settings(PARAMS['imagenet'], row.settings['imagenet'])['pretrain']) for row in GRIDS[name].rows]
    for label, recipe, _ in set_by('self-classifier/8'):
        assert (recipe['loss']['col_temp'], recipe['loss']['row_temp']) == (label['tau_col'], label['tau_row'])
    for label, recipe, pretrain in set_by('self-classifier/9'):
        assert pretrain['batch_size'] == label['batch_size'] and recipe['optimizer']['lr'] == pytest.approx(.3 * label['batch_size'] / 256)
        assert recipe['schedule']['final_lr'] == pytest.approx(recipe['optimizer']['lr'] / 1000)
    for label, recipe, _ in set_by('self-classifier/11'):
        assert recipe['queue'] == label['queue_len']
    for label, recipe, _ in set_by('self-classifier/7'):
        hidden = recipe['model']['hidden']
        written = 'none' if hidden is None else f'{len(hidden)}x{hidden[0]}' if isinstance(hidden, list) else f'1x{hidden}'
        assert (written, recipe['model']['dim']) == (label['hidden'], label['out_dim'])
    for label, recipe, _ in set_by('self-classifier/10'):
        assert (recipe['views']['n_local'] > 0, recipe['queue'] > 0) == (label['multi_crop'], label['nearest_neighbour'])


def test_a_changed_number_or_recipe_changes_the_name():
    names = lambda params: {run.name for run in plan([GRIDS['self-classifier/8']], BASE, params).experiments}
    same, other = names(PARAMS['digits']), names(with_settings(PARAMS['digits'], {'methods.selfclassifier.model.width': 8}))
    assert same == names(with_settings(PARAMS['digits'], {'seeds': [5]})) and not same & other


@pytest.mark.parametrize('words, said', [
    (('list', '--table', '12'), "no grid for a table '12' in conf/ablations; did you mean 'self-classifier/11'"),
    (('list', '--table', 'scan/fig9'), "did you mean 'scan/fig"),
    (('run', '--on', 'imagnet'), "no entry 'imagnet'; did you mean 'imagenet'"),
    (('run', '--on', 'imagenet'), 'put its recipe in place first'),
])
def test_unknown_names_are_one_line(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1


@pytest.mark.parametrize('key, near', [('methods.selfclassifier.model.clases', 'classes'), ('pretrain.batchsize', 'batch_size'), ('methods.selfclassifer.epochs', 'selfclassifier'), ('knn.kk', 'k')])
def test_unknown_settings_name_the_nearest(tmp_path, key, near):
    for file in ('base.yaml', 'self-classifier-06-classifier.yaml'):
        shutil.copy(ROOT/'conf'/'ablations'/file, tmp_path)
    file = tmp_path/'self-classifier-06-classifier.yaml'
    file.write_text(re.sub(r'digits: {methods\S+', f'digits: {{{key}:', file.read_text()))
    base, grids = read_grids(tmp_path)
    with pytest.raises(ParamsError, match=f"did you mean '{near}'"):
        plan(choose_grids(grids), base, PARAMS['digits'])


def test_a_row_the_table_does_not_have(tmp_path):
    shutil.copy(ROOT/'conf'/'ablations'/'base.yaml', tmp_path)
    (tmp_path/'a.yaml').write_text('table: self-classifier/6\nmethod: selfclassifier\nrows: [{label: {classifier: fixd}, digits: {}}]')
    with pytest.raises(ParamsError, match="no rows are called 'fixd'; did you mean 'fixed'"):
        read_grids(tmp_path)


def test_settings_reach_params_as_they_are_written(tmp_path):
    "Every setting of every row, through the grammar and the YAML of `dvc exp run -S`."
    from dvc.utils.hydra import apply_overrides
    for size, params in PARAMS.items():
        for run in plan([GRIDS[name] for name in OWN], BASE, params, size).experiments:
            shutil.copy(ROOT/'conf'/{'digits': 'digits.yaml', 'imagenet': 'imagenet-100ep.yaml'}[size], tmp_path/'params.yaml')
            words = queue_words(run)
            apply_overrides(tmp_path/'params.yaml', [word for before, word in zip(words, words[1:]) if before == '-S'])
            assert read_yaml(tmp_path/'params.yaml') == with_settings(params, run.settings), run.name


def shown(run, values):
    "What `dvc exp show --json` says of a run."
    metrics = {f'out/{stage}/{run.method}/{run.dataset}.json': {'data': {str(seed): {name: value for seed, value in zip(run.settings['seeds'], [value]*9)} for seed in run.settings['seeds']}}
               for stage, (name, value) in zip(('cluster', 'linear'), values.items())}
    return [{'rev': 'a'*40, 'experiments': [{'name': run.name, 'revs': [{'rev': 'b'*40, 'data': {'metrics': metrics}}]}]}]


def test_scores_are_found_whole_or_not_at_all():
    todo = plan([GRIDS['self-classifier/6']], BASE, PARAMS['digits'])
    baseline, fixed = todo.baselines['selfclassifier'], todo.rows['self-classifier/6', 0]
    assert run_scores(shown(baseline, {'acc': .9, 'knn_top1': .95}), baseline) == {'acc': [.9]*5, 'knn_top1': [.95]*5}
    assert run_scores(shown(baseline, {'acc': .9, 'knn_top1': .95}), fixed) == {} == run_scores([], fixed)
    lost = shown(baseline, {'acc': .9, 'knn_top1': .95})
    del lost[0]['experiments'][0]['revs'][0]['data']['metrics']['out/cluster/selfclassifier/digits.json']['data']['3']
    assert run_scores(lost, baseline) == {'knn_top1': [.95]*5}, 'four seeds of five are not a baseline'


@pytest.mark.parametrize('name', GRIDS)
def test_what_has_not_run_is_a_gap(name):
    grid = GRIDS[name]
    todo = plan(list(GRIDS.values()), BASE, PARAMS['digits'])
    table = collect_grid(grid, todo, {})
    assert len(table.lines) == len(grid.rows) + 1 and all(line.state and not line.ours for line in table.lines)
    text, cells = table_markdown(table), list(csv.DictReader(io.StringIO(table_csv(table))))
    assert all(cell['state'] and not cell['mean'] for cell in cells)
    assert len({line.count('|') for line in text.splitlines() if line.startswith('|')}) == 1
    assert table_html(table).count('<tr>') == len(grid.rows) + 2 and 'nan' not in text.lower()
    if grid.table:
        numbers = [number for row in published(grid.table).rows for number in row.cells.values() if number]
        assert sum(bool(cell['published']) for cell in cells) == len(numbers) > 0


def test_queue_is_read_whatever_else_is_in_it():
    assert queue_states('Task  Name  Created  Status\nabc1234  mine  05:00 AM  Running\n\nWorker status: 0 active, 0 idle\n') == {}


def test_a_place_without_history_is_refused(tmp_path):
    for name in ('settings.ini', 'params.yaml', 'dvc.yaml', 'conf', 'nbs', 'selfclass'):
        (tmp_path/name).symlink_to(ROOT/name)
    ran = python('-m', 'selfclass.ablations', 'run', '--table', '6', cwd=tmp_path, GIT_CEILING_DIRECTORIES=str(tmp_path.parent), GIT_DIR=str(tmp_path/'nothing'))
    assert ran.returncode in (1, 2) and ran.stderr.startswith('selfclass: ') and ran.stderr.count('\n') == 1, ran.stderr


@pytest.mark.long
def test_a_table_through_the_queue_of_dvc(tmp_path):
    "Two rows, for real: queued, run in DVC's temporary folders, collected; given again, nothing runs twice; the workspace is as it was."
    folder = tmp_path/'repository'
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns('.git', '.venv', 'out', '.checkpoints', 'cache', 'tmp', 'config.local', '*.egg-info', '__pycache__', '.pytest_cache', 'benchmarks'))
    params = with_settings(read_yaml(ROOT/'params.yaml'), {'seeds': [0], 'methods.selfclassifier.epochs': 4, 'methods.selfclassifier.model.width': 4, 'methods.selfclassifier.model.classes': [10, 10, 20]})
    (folder/'params.yaml').write_text(json.dumps(params, indent=1))
    base = folder/'conf'/'ablations'/'base.yaml'
    base.write_text(base.read_text().replace('predict_every: 160', 'predict_every: 4').replace('[0, 1, 2, 3, 4]', '[0, 1]'))
    (folder/'dvc.lock').unlink(missing_ok=True)
    say = lambda *words: subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': '', 'PATH': os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']})
    for words in (('init', '-q'), ('add', '-A'), ('-c', 'user.name=t', '-c', 'user.email=t@example.org', 'commit', '-qm', 'start')):
        say('git', *words)
    early = say(sys.executable, '-m', 'selfclass.ablations', 'run', '--table', '6')
    assert early.returncode == 2 and 'make repro' in early.stderr
    assert say(sys.executable, '-m', 'dvc', 'repro', 'report').returncode == 0
    say('git', 'add', '-A'), say('git', '-c', 'user.name=t', '-c', 'user.email=t@example.org', 'commit', '-qm', 'run')
    ran = say(sys.executable, '-m', 'selfclass.ablations', 'run', '--table', '6')
    assert ran.returncode == 0, ran.stderr
    cells = list(csv.DictReader(io.StringIO((folder/'out'/'ablations'/'self-classifier-6.csv').read_text())))
    assert [(cell['row'], cell['n']) for cell in cells if cell['column'] == 'ACC'] == [('baseline', '2'), ('fixed', '1'), ('learnable', '2')]
    assert not say('git', 'status', '--porcelain').stdout
    again = say(sys.executable, '-m', 'selfclass.ablations', 'run', '--table', '6')
    assert again.returncode == 0 and len(say('git', 'for-each-ref', 'refs/exps').stdout.splitlines()) >= 2
    say(sys.executable, '-m', 'dvc', 'queue', 'stop', '--kill')


def test_a_run_of_other_code_stands_in_and_says_so(monkeypatch):
    from selfclass import ablations
    todo = plan([GRIDS['self-classifier/6']], BASE, PARAMS['digits'])
    baseline, fixed = todo.baselines['selfclassifier'], todo.rows['self-classifier/6', 0]
    older = Experiment(fixed.name[:-4] + '0000', fixed.settings, fixed.targets, fixed.method, fixed.dataset)
    found = shown(baseline, {'acc': .9}) + shown(older, {'acc': .8})
    monkeypatch.setattr(ablations, 'finished', lambda: {older.name: 'a'*40, baseline.name: 'a'*40, 'ablation-of-others-00000000-0000': 'c'*40})
    monkeypatch.setattr(ablations, '_dvc', lambda *words, **environment: json.dumps(found))
    table = collect_grid(GRIDS['self-classifier/6'], todo, ablations.find_results(todo))
    assert [(line.ours['ACC'].mean, line.remarks) for line in table.lines] == [(.9, ()), (.8, ('measured with other code than the present one',)), (.9, ())]


def test_workers_share_the_cores(monkeypatch):
    from selfclass.ablations import _shares
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert _shares(1) == {} and int(_shares(2)['OMP_NUM_THREADS']) >= 1
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    assert _shares(2) == {}
