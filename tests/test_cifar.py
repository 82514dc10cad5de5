"""The recipes of CIFAR for one large GPU, through the command line, on CPU and a few pictures: training, an interruption, scores, figures, and the profile of a step."""
import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from PIL import Image

from selfclass import train
from selfclass.cli import main
from selfclass.core import load_json, read_yaml
from selfclass.shards import join_shards, write_shards


def picture(c, rng):
    "A noisy bar of one of ten colours and directions, 32 x 32, as PNG bytes."
    angle, colour = np.pi * c / 10, np.array([c % 3, c % 4, c % 5]) * 50 + 50
    y, x = np.mgrid[-16:16, -16:16]
    bar = np.abs(x * np.sin(angle) + y * np.cos(angle) + rng.integers(-4, 5)) < 5
    file = io.BytesIO()
    Image.fromarray((bar[..., None] * colour + rng.integers(0, 40, (32, 32, 3))).clip(0, 255).astype(np.uint8)).save(file, 'png')
    return file.getvalue()


def cifar_folder(folder, n, n_test=20):
    "CIFAR-10 in the layout of the Hugging Face hub, of n and n_test made-up pictures."
    rng = np.random.default_rng(0)
    for split, size in (('train', n), ('test', n_test)):
        labels = np.arange(size) % 10
        table = pyarrow.table({'image': [{'bytes': picture(c, rng), 'path': None} for c in labels], 'label': labels})
        (folder/'cifar10').mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, folder/'cifar10'/f'{split}.parquet')
    return folder


def command(data, out, batch, *more):
    "The command of the recipe, with what makes it small."
    small = {'pretrain.batch_size': batch, 'pretrain.device': 'cpu', 'pretrain.checkpoint_every': 1, 'methods.selfclassifier.epochs': 2, 'methods.selfclassifier.schedule.warmup_epochs': 1, 'methods.selfclassifier.queue': batch,
             'linear.epochs': 2, 'linear.batch_size': 16}
    return ['train', '--params', ROOT/'conf'/'cifar10-h200.yaml', '--data', data, '--out', out, *(word for key, value in small.items() for word in ('--set', f'{key}={value}')), *more]


@pytest.mark.parametrize('n', [20, pytest.param(512, marks=pytest.mark.long)])
def test_the_recipe_trains_resumes_and_ends_with_scores(n, tmp_path, monkeypatch, capsys):
    data, batch = cifar_folder(tmp_path/'data', n), n // 2
    run = lambda name: main([str(word) for word in command(data, tmp_path/name, batch)])
    assert run('whole') == 0, capsys.readouterr().err
    save = train.Checkpoint.save

    def stopped(checkpoint, epoch):
        save(checkpoint, epoch)
        if epoch == 0:
            raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(train.Checkpoint, 'save', stopped)
        assert run('resumed') == 130 and not (tmp_path/'resumed'/'model.safetensors').exists()
    assert run('resumed') == 0
    for name in ('model.safetensors', 'config.json', 'log.csv', 'predictions.npz', 'embeddings.npz'):
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'resumed'/name).read_bytes(), name
    scored, measured = load_json(tmp_path/'whole'/'scores.json'), load_json(tmp_path/'whole'/'profile.json')
    assert scored['scores'] == load_json(tmp_path/'resumed'/'scores.json')['scores']
    assert {'acc', 'nmi', 'ari', 'knn_top1', 'linear_top1', 'acc_many_to_one_20'} <= set(scored['scores']) and scored['protocol'].endswith('held out)')
    assert 9e9 < measured['flops_per_image'] < 12e9, 'two views of 1.1 GFLOP, four of a quarter, forward and two gradients'
    assert {'run-curves.png', 'run-best.png', 'run-confusion.png', 'run-map.png'} <= {file.name for file in (tmp_path/'whole'/'figures').iterdir()}
    said = capsys.readouterr().out
    assert said.count('views/s with 1 process(es)') == 2 and said.count('ms a step (views') == 2, 'both runs say their pace, and where a step spends its time'


def test_weights_of_the_network_travel_in_small_files(tmp_path):
    "A ResNet-18 with its heads in files below 15 MiB, and back: what it says changes by rounding."
    import torch

    from selfclass.hub import load_pretrained, save_pretrained
    from selfclass.model import ClusterNet
    torch.manual_seed(0)
    net = ClusterNet(**read_yaml(ROOT/'conf'/'cifar10-h200.yaml')['methods']['selfclassifier']['model']).eval()
    save_pretrained(net, tmp_path/'run', seed=0)
    pieces = write_shards(tmp_path/'run', tmp_path/'pieces')
    assert len(pieces) > 3 and max(piece.stat().st_size for piece in pieces) <= 15 * 2**20
    again, x = load_pretrained(join_shards(tmp_path/'pieces', tmp_path/'again')), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        one, other = (model.project(model.features(x)) for model in (net, again))
    assert (one - other).norm() < .02 * one.norm()
