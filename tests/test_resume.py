"""A run that was interrupted ends in the same bytes as one that was not."""
import json

import pytest
from conftest import python

PROGRAM = '''
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from selfclass.data import ImageSet
from selfclass.selfclassifier import fit_selfclassifier
from selfclass.train import save_run
out, state = sys.argv[1:]
import os
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
    assert killed.returncode == 9 and (state/'last.pt').exists() and not (tmp_path/'killed').exists(), 'killed in the middle'
    resumed = python(program, tmp_path/'resumed', state)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in ('model.safetensors', 'config.json', 'log.csv', 'predictions.npz'):
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'resumed'/name).read_bytes(), name
    assert not state.exists(), 'a finished run leaves no checkpoint'
    assert json.loads((tmp_path/'resumed'/'config.json').read_text())['seed'] == 3
