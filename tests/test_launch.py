"""Several processes are one: started from a script, by torchrun, under Slurm, on several machines."""
import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import workers
import yaml
from conftest import ROOT, python
from PIL import Image
from safetensors.torch import load_file

from selfclass.augment import MultiCrop
from selfclass.core import load_arrays
from selfclass.data import ImageSet
from selfclass.dist import launch
from selfclass.embed import assign_images
from selfclass.errors import DataError, TrainingError
from selfclass.model import ClusterNet
from selfclass.train import ViewLoader

SMALL = {
    'datasets': {'shapes': {'source': 'shapes', 'size': 16}},
    'pretrain': {'batch_size': 96, 'device': 'cpu'},
    'methods': {'selfclassifier': {
        'epochs': 2, 'queue': 200, 'schedule': {'warmup_epochs': 1.},
        'model': {'backbone': 'convnet', 'width': 8, 'hidden': 32, 'dim': 16, 'classes': [4, 7]},
        'views': {'preset': 'natural', 'n_global': 2, 'n_local': 1, 'global_size': 16, 'local_size': 8},
        'optimizer': {'name': 'lars', 'lr': .1}}}}


@pytest.fixture
def params(tmp_path):
    (tmp_path/'settings.ini').symlink_to(ROOT/'settings.ini')            # checkpoints go below it
    (tmp_path/'small.yaml').write_text(yaml.safe_dump(SMALL))
    return tmp_path/'small.yaml'


def train(params, out, *words, before=(), **env):
    ran = python(*before, '-m', 'selfclass.cli', 'train', '--params', params, '--out', out, *words, cwd=params.parent, **env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran


def until(happened, seconds=60):
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < seconds, 'waited too long'
        time.sleep(.1)


def losses(out):
    with open(out/'log.csv', newline='') as file:
        return [float(row['loss']) for row in csv.DictReader(file)]


def assert_same_run(one, other):
    np.testing.assert_allclose(losses(one), losses(other), rtol=2e-4)
    a, b = (load_file(run/'model.safetensors') for run in (one, other))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-4, msg=lambda text: f'{name}: {text}')
    ids = [load_arrays(run/'predictions.npz')['train'] for run in (one, other)]
    assert ids[0].shape == ids[1].shape and (ids[0] == ids[1]).mean() > .98
    shown, again = (load_arrays(run/'views.npz') for run in (one, other))          # made of images and numbers alone: no rounding of a network
    assert shown.keys() == again.keys() and shown.keys() >= {'images', 'view_0', 'view_1'}
    for name in shown:
        np.testing.assert_array_equal(shown[name], again[name], err_msg=name)


def test_training_does_not_depend_on_the_number_of_processes(params, tmp_path):
    "Order, views, batch norm, queue, loss and gradients are those of one process; so are the files."
    train(params, tmp_path/'one')
    for n in (2, 3):
        said = train(params, tmp_path/f'{n}', '--processes', str(n)).stdout
        assert f'with {n} process(es)' in said
        assert_same_run(tmp_path/'one', tmp_path/f'{n}')


def test_pictures_decoded_by_workers_too(params, tmp_path):
    "A folder of JPEGs of different sizes, decoded on demand by spawned workers of two processes."
    draw = np.random.default_rng(0)
    (tmp_path/'pictures').mkdir()
    for i in range(40):
        coarse = draw.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60 + i, 90 - i)).save(tmp_path/'pictures'/f'{i:02}.jpg')
    recipe = SMALL['methods']['selfclassifier'] | {'epochs': 1, 'queue': 0, 'schedule': {}}
    for n, workers in ((1, 0), (2, 1)):
        params.write_text(yaml.safe_dump(SMALL | {'datasets': {'mine': {'source': str(tmp_path/'pictures'), 'test': .2}}, 'methods': {'selfclassifier': recipe},
                                                  'pretrain': {'batch_size': 16, 'device': 'cpu', 'workers': workers}}))
        train(params, tmp_path/f'{n}', '--processes', str(n))
    assert_same_run(tmp_path/'1', tmp_path/'2')


def test_a_broken_picture_met_by_a_worker_keeps_its_name(tmp_path):
    "Met by a decoding worker of the loader, or by one that predicts: one line, the file, nothing of torch's."
    draw = np.random.default_rng(0)
    (tmp_path/'pictures').mkdir()
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path/'pictures'/f'{i:02}.jpg')
    broken = tmp_path/'pictures'/'07.jpg'
    broken.write_bytes(broken.read_bytes()[:700])
    images = ImageSet('mine', files=tuple(sorted((tmp_path/'pictures').iterdir())))          # decoded on demand, however small
    crop, net = MultiCrop('natural', n_local=0, global_size=16), ClusterNet('convnet', width=4, hidden=None, dim=16, classes=(3,))
    for meet in (lambda: list(ViewLoader(images, crop, 4, workers=2)), lambda: assign_images(net, images, crop.plain, 4, 'cpu', workers=2)):
        with pytest.raises(DataError, match='07.jpg cannot be decoded') as met:
            meet()
        assert '\n' not in str(met.value) and 'Traceback' not in str(met.value) and str(tmp_path) in str(met.value)


def test_torchrun_starts_the_same_module(params, tmp_path):
    train(params, tmp_path/'one')
    said = train(params, tmp_path/'two', before=('-m', 'torch.distributed.run', '--nproc-per-node', '2')).stdout
    assert said.count('with 2 process(es)') == 1
    assert_same_run(tmp_path/'one', tmp_path/'two')


def test_slurm_tasks_find_each_other(params, tmp_path):
    def task(number):
        env = os.environ | {'PYTHONPATH': str(ROOT), 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_PROCID': str(number), 'SLURM_LOCALID': str(number),
                            'SLURM_STEP_NODELIST': 'localhost', 'SLURM_JOB_ID': str(os.getpid())}
        return subprocess.Popen([sys.executable, '-m', 'selfclass.cli', 'train', '--params', params, '--out', tmp_path/'slurm'], env=env, cwd=tmp_path,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    tasks = [task(number) for number in range(2)]
    said = [one.communicate(timeout=180) for one in tasks]
    assert [one.returncode for one in tasks] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    assert 'with 2 process(es)' in said[0][0] and not said[1][0]


def test_two_machines_meet_at_a_rendezvous(params, tmp_path):
    "Two launches of one process each, as on two machines."
    address = f'localhost:{20000 + os.getpid() % 20000}'
    words = [sys.executable, '-m', 'selfclass.cli', 'train', '--params', params, '--out', tmp_path/'nodes', '--nodes', '2', '--rendezvous', address]
    runs = [subprocess.Popen(words, env=os.environ | {'PYTHONPATH': str(ROOT)}, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=180) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    assert [out.count('with 2 process(es)') for out, _ in said] in ([0, 1], [1, 0]), 'process 0 alone speaks, and scores the run'
    assert (tmp_path/'nodes'/'scores.json').exists()


def test_results_prints_and_threads(capfd, monkeypatch):
    pids = launch(workers.say, 'this is', processes=2)
    assert len(set(pids)) == 2 and os.getpid() not in pids
    assert [line for line in capfd.readouterr().out.splitlines() if 'this is' in line] == ['process 0: this is 0']
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)             # of whoever runs the tests: launch leaves it as it is
    seen = launch(workers.rank_and_threads, processes=3)
    assert [(r, n) for r, n, _ in seen] == [(0, 3), (1, 3), (2, 3)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    assert all(1 <= threads <= max(1, cores // 3) for *_, threads in seen), 'together they ask for no more than there is'


def test_alone_nothing_is_started():
    assert launch(workers.say, 'alone') == [os.getpid()]


def test_errors_come_back_as_themselves_and_handlers_stay():
    handler, began = signal.getsignal(signal.SIGINT), time.monotonic()
    with pytest.raises(DataError, match='^the last one has no pictures$'):
        launch(workers.fail_on_last, 'the last one has no pictures', processes=2)
    with pytest.raises(TrainingError, match=r'process 0 stopped: Signal 9.*memory may have run out'):
        launch(workers.kill_first, processes=2)
    with pytest.raises(TrainingError, match="invalid literal"):
        launch(int, 'x', processes=2)
    assert signal.getsignal(signal.SIGINT) is handler
    assert time.monotonic() - began < 50, 'the others are ended, not waited for'


def test_ctrl_c_ends_all_processes_and_says_one_line(params, tmp_path):
    slow = SMALL | {'methods': {'selfclassifier': SMALL['methods']['selfclassifier'] | {'epochs': 5000}}}
    params.write_text(yaml.safe_dump(slow))
    run = subprocess.Popen([sys.executable, '-m', 'selfclass.cli', 'train', '--params', params, '--out', tmp_path/'never', '--processes', '2'], cwd=tmp_path,
                           env=os.environ | {'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: list(tmp_path.glob('.checkpoints/**/last.pt')))
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.strip().splitlines()[-1].startswith('selfclass: interrupted'), err[-2000:]
    until(lambda: not subprocess.run(['pgrep', '-g', str(run.pid)], capture_output=True).stdout)
    assert list(tmp_path.glob('.checkpoints/**/last.pt')), 'the next command goes on from here'


@pytest.mark.parametrize('n', [1, 2, 4])
def test_rows_are_gathered_in_the_order_of_the_batch(n):
    assert launch(workers.dealt, 8, processes=n) == [list(range(8))] * n


def test_batch_norm_over_processes_is_that_of_one():
    alone = launch(workers.batch_norm, None)[0]
    for shared in launch(workers.batch_norm, None, processes=2):
        for a, b in zip(alone, shared):
            torch.testing.assert_close(a, b)
    groups = launch(workers.batch_norm, 2, processes=4)               # two groups of two: 0, 1 and 2, 3
    assert not torch.equal(groups[0][4], groups[2][4]) and torch.equal(groups[0][4], groups[1][4])
