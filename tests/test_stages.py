"""The stages themselves: each on its default cell, typed parameters, the same bytes twice, DVC's own commands."""
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, cells_of, python, source_of
from selfclass.core import load_json, read_yaml

ORDER = ('modules', 'pretrain', 'embed', 'linear', 'cluster', 'derive', 'report', 'compare')


def dvc(*words, cwd, timeout=600):
    return subprocess.run([sys.executable, '-m', 'dvc', *words], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def scratch_repository(folder):
    "A copy of the repository without its results, under Git, with a params file that takes seconds."
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns('.git', '.venv', 'out', '.checkpoints', 'cache', 'tmp', 'config.local', '*.egg-info', '__pycache__', '.pytest_cache'))
    params = read_yaml(ROOT/'params.yaml')
    recipe = params['methods']['selfclassifier']
    recipe |= {'epochs': 4}
    recipe['model'] |= {'width': 4, 'classes': [10, 10, 20]}
    params |= {'seeds': [0]}
    params['linear'] |= {'epochs': 2}
    (folder/'params.yaml').write_text(json.dumps(params, indent=1))
    (folder/'dvc.lock').unlink(missing_ok=True)
    for words in (('init', '-q'), ('add', '-A'), ('-c', 'user.name=t', '-c', 'user.email=t@example.org', 'commit', '-qm', 'start')):
        subprocess.run(['git', *words], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope='module')
def smoked(tmp_path_factory):
    "Every stage run on its default cell in an empty repository."
    folder = tmp_path_factory.mktemp('smoke')
    (folder/'settings.ini').symlink_to(ROOT/'settings.ini')
    for stage in ORDER:
        source = '\n'.join(source_of(c) for c in cells_of(ROOT/'nbs'/'pipeline'/f'{stage}.ipynb') if c['cell_type'] == 'code')
        ran = python('-c', source, cwd=folder, MPLBACKEND='agg')
        assert ran.returncode == 0, f'{stage}: {ran.stderr[-3000:]}'
    return folder


def test_every_stage_runs_on_its_default_cell(smoked):
    summary = load_json(smoked/'out'/'report'/'summary.json')
    assert 0 <= summary['shapes/selfclassifier/acc']['mean'] <= 1 and summary['shapes/selfclassifier/acc']['n'] == 1
    page = (smoked/'out'/'report'/'index.html').read_text()
    assert '<table' in page and 'src="http' not in page and '<script' not in page
    assert {'model.safetensors', 'config.json', 'log.csv', 'predictions.npz'} <= {f.name for f in (smoked/'out/pretrain/selfclassifier/shapes-0').iterdir()}


def test_types_reach_the_notebook(tmp_path):
    "1e-05, false, null, lists and nested sections, through the command line."
    pipeline = tmp_path/'nbs'/'pipeline'
    pipeline.mkdir(parents=True)
    shutil.copy(ROOT/'settings.ini', tmp_path)
    cells = [dict(cell_type='code', id='a', metadata={'tags': ['parameters']}, source='seed = 7\nsection = {}', outputs=[], execution_count=None),
             dict(cell_type='code', id='b', metadata={}, source='print(repr((seed, section)))', outputs=[], execution_count=None)]
    (pipeline/'typed.ipynb').write_text(json.dumps(dict(cells=cells, nbformat=4, nbformat_minor=5, metadata={'kernelspec': dict(name='python3', language='python', display_name='x')})))
    (tmp_path/'params.yaml').write_text('section:\n  lr: 1e-05\n  amp: false\n  name: null\n  crops: [2, 6]\n  deep: {off: off, sizes: [1.5, 1]}\n')
    texts = []
    for _ in range(2):
        ran = python('-m', 'selfclass.run', 'typed', '--seed', '3', cwd=tmp_path)
        assert ran.returncode == 0 and ran.stdout.strip() == 'out/notebooks/typed/3.ipynb', ran.stderr
        texts.append((tmp_path/'out/notebooks/typed/3.ipynb').read_bytes())
    assert texts[0] == texts[1]
    said = ''.join(json.loads(texts[0])['cells'][-1]['outputs'][0]['text'])
    assert said.strip() == repr((3, {'lr': 1e-05, 'amp': False, 'name': None, 'crops': [2, 6], 'deep': {'off': 'off', 'sizes': [1.5, 1]}}))


def test_dvc_runs_compares_and_sweeps(tmp_path):
    "dvc repro, a second one with nothing to do, dag, metrics, plots, and a sweep with a number in exponent form."
    here = scratch_repository(tmp_path/'copy')
    first = dvc('repro', 'report', cwd=here)
    assert first.returncode == 0, first.stdout[-1500:] + first.stderr[-1500:]
    lock = (here/'dvc.lock').read_bytes()
    assert 'up to date' in dvc('repro', 'report', cwd=here).stdout
    dag = dvc('dag', cwd=here).stdout
    assert all(stage in dag for stage in ORDER)
    shown = json.loads(dvc('metrics', 'show', '--json', cwd=here).stdout)
    assert 'digits/selfclassifier/acc' in shown['']['data']['out/report/summary.json']['data']
    plots = dvc('plots', 'show', cwd=here)
    assert plots.returncode == 0, plots.stderr
    assert 'https://' not in (here/'dvc_plots'/'index.html').read_text().replace('https://vega.github.io/schema', '')
    subprocess.run(['git', 'add', '-A'], cwd=here, check=True)
    subprocess.run(['git', '-c', 'user.name=t', '-c', 'user.email=t@example.org', 'commit', '-qm', 'run'], cwd=here, check=True)
    swept = dvc('exp', 'run', '-S', 'methods.selfclassifier.optimizer.lr=0.00001', 'report', cwd=here)
    assert swept.returncode == 0, swept.stdout[-1500:] + swept.stderr[-1500:]
    assert '1e-05' in (here/'params.yaml').read_text()
    assert load_json(here/'out/pretrain/selfclassifier/digits-0/config.json')['recipe']['optimizer']['lr'] == 1e-05
    assert (here/'dvc.lock').read_bytes() != lock
    assert dvc('metrics', 'diff', cwd=here).returncode == 0 and dvc('params', 'diff', cwd=here).returncode == 0
    assert dvc('exp', 'show', '--csv', cwd=here).returncode == 0


def rerun(here, *files, params=()):
    "Stages of pretrain and derive that DVC runs again once these files, or entries of params.yaml, have changed."
    from dvc.repo import Repo
    found = set()
    for stage in Repo(str(here)).index.stages:
        deps = {dep.def_path for dep in stage.deps if not hasattr(dep, 'params')}
        numbers = {name for dep in stage.deps if hasattr(dep, 'params') for name in dep.params}
        name = getattr(stage, 'name', '')
        if name.startswith(('pretrain', 'derive')) and (deps & set(files) or numbers & set(params)):
            found.add(name)
    return found


def test_an_edit_of_one_method_reruns_that_method_only(tmp_path):
    "Its module, as the stage modules hands it on, or its entry."
    here = scratch_repository(tmp_path/'copy')
    code = here/'out'/'modules'
    assert dvc('repro', 'modules', cwd=here).returncode == 0
    before = {file.name: file.read_bytes() for file in code.iterdir()}
    methods, derive = (read_yaml(here/'params.yaml')[section] for section in ('methods', 'derive'))
    assert set(before) == {f'{name}.py' for name in methods | derive}
    with (here/'selfclass'/'sela.py').open('a') as file: file.write('\n# a remark\n')
    assert dvc('repro', 'modules', cwd=here).returncode == 0
    changed = [f'out/modules/{file.name}' for file in code.iterdir() if file.read_bytes() != before[file.name]]
    names = [name for name, entry in methods.items() if entry.get('module') == 'sela']
    assert names and rerun(here, 'selfclass/sela.py') == set()
    assert rerun(here, *changed) == {f'pretrain@digits-{name}-0' for name in names}
    assert rerun(here, params=[f'methods.{names[0]}']) == {f'pretrain@digits-{names[0]}-0'}
    assert rerun(here, params=['derive.kmeans']) == {'derive@kmeans'}


def test_without_git(tmp_path):
    "From a tarball: DVC's no-scm mode."
    here = tmp_path/'tarball'
    shutil.copytree(ROOT, here, symlinks=True, ignore=shutil.ignore_patterns('.git', '.venv', 'out', '.checkpoints', 'cache', 'tmp', 'docs', 'data', '*.egg-info', '__pycache__', '.pytest_cache'))
    assert dvc('config', '--local', 'core.no_scm', 'true', cwd=here).returncode == 0
    assert dvc('pull', 'data.dvc', cwd=here).returncode == 0 and (here/'data/digits/digits.npz').exists()
    assert dvc('repro', 'modules', cwd=here).returncode == 0 and (here/'out/modules/selfclassifier.py').exists()


@pytest.mark.long
def test_two_runs_of_the_pipeline_give_the_same_hashes(tmp_path):
    "Weights, metrics, figures and executed notebooks of the real digits pipeline, twice from scratch."
    locks = []
    for name in ('one', 'two'):
        here = scratch_repository(tmp_path/name)
        shutil.copy(ROOT/'params.yaml', here/'params.yaml')
        ran = dvc('repro', 'report', cwd=here, timeout=1800)
        assert ran.returncode == 0, ran.stderr[-2000:]
        locks.append((here/'dvc.lock').read_bytes())
    assert locks[0] == locks[1]
    summary = load_json(here/'out'/'report'/'summary.json')
    assert summary['digits/selfclassifier/acc']['mean'] >= .95 and summary['digits/selfclassifier/acc']['min'] >= .93
    assert summary['digits/selfclassifier/knn_top1']['mean'] >= .98 and summary['digits/selfclassifier/linear_top1']['mean'] >= .98
