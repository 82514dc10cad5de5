"""A run that was interrupted ends in the same bytes as one that was not."""
import json
import os
import shutil
import stat

import pytest
import workers
from conftest import python
from test_launch import assert_same_run

from selfclass.dist import launch
from selfclass.errors import TrainingError

PROGRAM = '''
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from selfclass.data import ImageSet
from selfclass.selfclassifier import fit_selfclassifier
from selfclass.train import save_run
out, state = sys.argv[1:]
import os
os.umask(0o027)
from selfclass import selfclassifier, train
class Mortal(train.Checkpoint):
    "A checkpoint after whose third writing the power fails, once."
    def save(self, epoch):
        super().save(epoch)
        if epoch == 5 and os.environ.get("POWER_FAILS"): os._exit(9)
selfclassifier.Checkpoint = Mortal
images = ImageSet("noise", torch.randint(0, 256, (256, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
run = fit_selfclassifier(images, model=dict(backbone="convnet", width=8, hidden=16, dim=8, classes=(5, 10)), views=dict(preset="glyphs", n_local=1, global_size=8, local_size=8),
                         optimizer=dict(name="{optimizer}", lr=.01), schedule=dict(warmup_epochs=2.), epochs=12, batch_size=32, queue=40, device="cpu", seed=3,
                         held_out=images.subset(range(50)), predict_every=5, checkpoint_every=2, checkpoints=Path(state) if state != "none" else None)
save_run(run, out, seed=3)
'''


@pytest.mark.parametrize('optimizer', ['lars', 'adamw'])
def test_killed_and_resumed_equals_uninterrupted(optimizer, tmp_path):
    program = tmp_path/'train.py'
    program.write_text(PROGRAM.replace('{optimizer}', optimizer))
    whole = python(program, tmp_path/'whole', 'none')
    assert whole.returncode == 0, whole.stderr[-2000:]
    state = tmp_path/'state'
    killed = python(program, tmp_path/'killed', state, POWER_FAILS='yes')
    assert stat.S_IMODE((state/'last.pt').stat().st_mode) == 0o640, 'the umask of the program decides who reads a checkpoint'
    assert killed.returncode == 9 and (state/'last.pt').exists() and not (tmp_path/'killed').exists(), 'killed in the middle'
    resumed = python(program, tmp_path/'resumed', state)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in ('model.safetensors', 'config.json', 'log.csv', 'predictions.npz'):
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'resumed'/name).read_bytes(), name
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path/'resumed').iterdir()} == {0o640}, 'and a run'
    assert not state.exists(), 'a finished run leaves no checkpoint'
    assert json.loads((tmp_path/'resumed'/'config.json').read_text())['seed'] == 3


# ---- several processes ---------------------------------------------------------------------------------------------------

FILES = ['config.json', 'log.csv', 'model.safetensors', 'predictions.npz', 'views.npz']


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The run of two processes that nobody interrupts."
    out = tmp_path_factory.mktemp('whole')
    launch(workers.train_noise, out, None, processes=2)
    assert sorted(file.name for file in out.iterdir()) == FILES
    return out


def killed(folder, dies, says):
    "The checkpoint left by two processes of which one ends in the middle."
    with pytest.raises(TrainingError, match=f'process 1 stopped: .*{says}'):
        launch(workers.train_noise, folder/'never', folder/'state', dies, processes=2)
    assert (folder/'state'/'last.pt').exists() and not (folder/'never').exists(), 'after a checkpoint, before the end'
    return folder/'state'


@pytest.fixture(scope='module')
def left(tmp_path_factory):
    return killed(tmp_path_factory.mktemp('left'), 'signal', 'Signal 9')


def test_two_processes_killed_and_resumed_by_two(whole, left, tmp_path):
    "Every byte is that of the uninterrupted run."
    shutil.copytree(left, tmp_path/'state')
    speeds = launch(workers.train_noise, tmp_path/'two', tmp_path/'state', processes=2)
    assert [speed['processes'] for speed in speeds] == [2, 2]
    for name in FILES:
        assert (whole/name).read_bytes() == (tmp_path/'two'/name).read_bytes(), name
    assert not (tmp_path/'state').exists()


def test_two_processes_one_leaves_and_one_goes_on(whole, tmp_path):
    "The same run up to rounding, which the number of processes decides; the epochs of the two are the same bytes."
    state = killed(tmp_path, 'exit', '')
    assert launch(workers.train_noise, tmp_path/'one', state)[0]['processes'] == 1
    assert_same_run(whole, tmp_path/'one')
    before, after = ((run/'log.csv').read_text().splitlines() for run in (whole, tmp_path/'one'))
    assert before[:1 + workers.DIES_AFTER] == after[:1 + workers.DIES_AFTER] and len(before) == len(after) == 1 + workers.EPOCHS


def test_processes_without_a_common_folder_stop_together(left, tmp_path):
    "As on two machines that share no disk: the other has no checkpoint, or half of one. Neither goes on alone, neither waits."
    none, half = states = tmp_path/'none', tmp_path/'half'
    for state in states:
        shutil.copytree(left, f'{state}-0')
    os.mkdir(f'{half}-1')
    (tmp_path/'half-1'/'last.pt').write_bytes(b'half a file')
    for number, said in enumerate(launch(workers.train_apart, tmp_path/'never', states, processes=2)):
        (kind, apart), (other, broken) = said
        assert kind == other == 'TrainingError' and '\n' not in apart + broken
        assert 'some processes would resume at epoch 6, others at 0' in apart and 'a folder that all machines share' in apart and f'{none}-{number}' in apart
        assert ('cannot be resumed' if number else 'another process cannot resume') in broken and f'{half}-{number}' in broken
    assert not (tmp_path/'never').exists()
