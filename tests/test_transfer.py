"""The protocols of 63_transfer in one process and in two, and on a network that cannot be written into a notebook in a line."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import workers
from conftest import ROOT, cells_of, python, source_of
from torchvision import models

from selfclass.augment import MultiCrop
from selfclass.core import load_json
from selfclass.data import ImageSet, from_arrays, load_images
from selfclass.dist import launch
from selfclass.errors import DataError, MissingLabelsError, ParamsError
from selfclass.hub import save_pretrained
from selfclass.model import ClusterNet
from selfclass.transfer import conv_probes, crop_views, fine_tune, labelled_share, pooled_maps, pooled_side, probe_layers, run_probes, ten_crops

SECTION = {
    'linear_eval': dict(epochs=3, batch_size=32, standardize=True),
    'conv_probes': dict(epochs=2, batch_size=32, layers=['conv1', 'conv5'], lr=.05),
    'semi_supervised': dict(shares=[.1, .5], lr=[.01, .01], head_lr=[.1, .1], epochs=2, drops=[1], batch_size=16),
    'few_shot': dict(shots=[1, 3], draws=3),
}
SECTION = {name: numbers | {'device': 'cpu'} for name, numbers in SECTION.items()}


@pytest.fixture(scope='module')
def sets():
    "Shapes, whose classes take turns; the number of held-out pictures is odd, so that two processes cannot share them evenly."
    train, test = load_images('shapes', 'train'), load_images('shapes', 'test')
    return train.subset(range(200)), test.subset(range(77))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small network as a pretrain stage leaves it."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('run')
    net = ClusterNet(backbone='convnet', width=8, hidden=None, dim=32, classes=(4,))
    return save_pretrained(net, folder, recipe={'views': dict(preset='natural', n_global=2, n_local=1, global_size=16, local_size=8)})


def test_two_processes_are_one(run, sets):
    "The same weights of every trained layer, and each image scored once."
    one, = launch(workers.transfer_protocols, run, *sets, SECTION)
    two = launch(workers.transfer_protocols, run, *sets, SECTION, processes=2)
    assert two[0]['scores'] == two[1]['scores'] and one['scores'].keys() == two[0]['scores'].keys()
    for name, score in one['scores'].items():
        assert score == pytest.approx(two[0]['scores'][name], abs=1.5/77), name        # one picture on the border may change sides
    assert sorted(two[0]['scored'] + two[1]['scored']) == list(range(77)) == one['scored']
    for a, b in zip(one['logits'], two[0]['logits']):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_decoded_on_demand_is_in_memory(run, sets, tmp_path):
    "Files of a folder, some decoded by another process, give the scores of the same pixels in memory."
    from PIL import Image
    train, test = sets
    for split, images in (('train', train), ('test', test)):
        for i in range(len(images)):
            place = tmp_path/split/str(images.labels[i])/f'{i:03}.png'
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(place)
    files = [load_images(tmp_path, split, memory_budget=0) for split in ('train', 'test')]
    assert not files[0].in_memory
    held = [load_images(tmp_path, split) for split in ('train', 'test')]
    section = {name: SECTION[name] | extra for name, extra in (('linear_eval', {}), ('few_shot', {'workers': 1}), ('conv_probes', {'epochs': 1}))}
    on_demand, in_memory = (run_probes(run, *images, section) for images in (files, held))
    for name, score in in_memory.items():
        assert on_demand[name] == pytest.approx(score, abs=.06), name           # views of bytes are rounded to bytes
        if name.startswith('few_shot'):
            assert on_demand[name] == score, name                               # plain views are not


@pytest.mark.parametrize('protocol, saves, before, after, left', [
    ('linear_eval', 2, [0, 1], [2], ['linear_eval']), ('conv_probes', 1, [0], [1], ['conv_probes']),
    ('semi_supervised', 3, [0, 1, 0], [1], ['semi_10pct', 'semi_50pct'])])
def test_a_run_that_was_interrupted_goes_on(run, sets, tmp_path, monkeypatch, protocol, saves, before, after, left):
    """Stopped after some epochs: only the others are trained, weights and scores are those of a run in one go, and the checkpoints are removed at the end.

    The fine-tuning is stopped within its second share; the first one is not trained again."""
    from selfclass import transfer
    section, save, weights = {protocol: SECTION[protocol]}, transfer.Checkpoint.save, {}

    def stopped_after(n):
        "From now on: epochs as they are saved, and an interruption after the nth of them."
        epochs = []

        def note(self, epoch):
            save(self, epoch)
            epochs.append(epoch)
            weights[self.file.parent.name, epoch] = {name: value.clone() for name, value in next(iter(self.parts.values())).state_dict().items()}
            if len(epochs) == n:
                raise KeyboardInterrupt
        monkeypatch.setattr(transfer.Checkpoint, 'save', note)
        return epochs

    stopped_after(None)
    scores, in_one_go = run_probes(run, *sets, section, checkpoints=tmp_path/'one'), dict(weights)
    epochs = stopped_after(saves)
    with pytest.raises(KeyboardInterrupt):
        run_probes(run, *sets, section, checkpoints=tmp_path/'two')
    assert epochs == before and sorted(file.parent.name for file in (tmp_path/'two').rglob('last.pt')) == left
    epochs = stopped_after(None)
    assert run_probes(run, *sets, section, checkpoints=tmp_path/'two') == scores and epochs == after
    assert not (tmp_path/'one').exists() and not (tmp_path/'two').exists()
    for key, state in in_one_go.items():
        for name, value in state.items():
            assert torch.equal(weights[key][name], value), (key, name)


def test_alexnet_is_pooled_as_in_the_paper():
    "Channels of the paper's AlexNet give its five sizes; torchvision's smaller one comes as close from below, and the probes run on it."
    assert [c * pooled_side(c)**2 for c in (96, 256, 384, 384, 256)] == [9600, 9216, 9600, 9600, 9216]
    with torch.device('meta'):
        net = models.alexnet().eval()
    with pooled_maps(net, probe_layers(net)) as look:
        sizes = [m[0].numel() for m in look(torch.empty(1, 3, 224, 224, device='meta'))]
    assert len(sizes) == 5 and all(9000 <= size <= 9600 for size in sizes)


class Tiny(torch.nn.Module):
    "An AlexNet in little: convolutions and ReLUs that overwrite their input, batch norm, dropout, and linear layers that no probe should touch."
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(2),
                                            torch.nn.Conv2d(6, 8, 3), torch.nn.ReLU(inplace=True))
        self.classifier = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(8, 5), torch.nn.ReLU(inplace=True))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def test_any_network_can_be_probed_and_stays_as_it_is(sets):
    torch.manual_seed(0)
    net = Tiny().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    views = MultiCrop(preset='natural', n_local=0, global_size=16)
    scores = conv_probes(net, *sets, views, epochs=2, lr=.05, batch_size=50, device='cpu')
    assert set(scores) == {'conv1_top1', 'conv2_top1'} and all(.2 < score <= 1 for score in scores.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and all(m.training for m in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    with pytest.raises(ParamsError, match='no layer .conv3.'):
        conv_probes(net, *sets, views, layers=('conv3',), device='cpu')


@pytest.mark.parametrize('height, width', [(32, 40), (41, 32), (64, 64), (9, 20)])
def test_ten_crops_are_corners_and_centre_of_the_picture_and_its_mirror_image(height, width):
    picture = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(height), dtype=torch.uint8)
    crops = ten_crops(picture, 28)
    assert crops.shape == (10, 3, 28, 28) and crops.dtype == torch.uint8
    assert torch.equal(crops[[1, 0, 3, 2]].flip(3), crops[5:9])                     # mirror images of each other; the centre too when it has one
    assert torch.equal(crops[4].flip(2), crops[9]) or height < 28
    if min(height, width) == 32:                                                    # 32 = 28 * 256/224: nothing to resize
        ends = ((0, 0), (0, width - 28), (height - 28, 0), (height - 28, width - 28))
        for crop, (top, left) in zip(crops, ends):
            assert torch.equal(crop, picture[:, top:top + 28, left:left + 28])
        top, left = round((height - 28)/2), round((width - 28)/2)
        assert torch.equal(crops[4], picture[:, top:top + 28, left:left + 28])


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_labelled_shares_are_balanced_and_nested(seed):
    labels = np.random.default_rng(9).choice(7, 900, p=np.arange(1, 8)/28)
    sizes, smaller = np.bincount(labels), set()
    for share in (.05, .1, .3, .9, 1.):
        index = labelled_share(labels, share, seed)
        assert (np.abs(np.bincount(labels[index], minlength=7) - share * sizes) <= .5).all()
        assert smaller <= set(index) and (np.diff(index) > 0).all()
        assert np.array_equal(index, labelled_share(labels, share, seed))
        smaller = set(index)
    assert set(labelled_share(labels, .1, seed)) != set(labelled_share(labels, .1, seed + 10))


def test_fine_tuning_is_the_plain_loop_with_two_learning_rates(run, sets):
    "The same weights as torch's SGD with parameter groups and MultiStepLR, written out, from the same batches."
    import copy
    from torch.nn import functional as F
    from selfclass.hub import load_pretrained
    from selfclass.probe import linear_layer
    from selfclass.train import ViewLoader
    net, view, images = load_pretrained(run), crop_views(MultiCrop(preset='natural', global_size=16)), sets[0]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ours = fine_tune(net, images, view, 4, lr=.02, head_lr=.3, epochs=4, drops=(1, 3), factor=.5, batch_size=32, seed=5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    backbone, head = copy.deepcopy(net.backbone).train(), linear_layer(32, 4, seed=5)
    optimizer = torch.optim.SGD([{'params': backbone.parameters()}, {'params': head.parameters(), 'lr': .3}], lr=.02, momentum=.9)
    schedule, loader = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=.5), ViewLoader(images, view, 32, 5)
    for epoch in range(4):
        loader.set_epoch(epoch)
        for index, (x,) in loader:
            optimizer.zero_grad()
            F.cross_entropy(head(backbone(x)), torch.as_tensor(images.labels)[index]).backward()
            optimizer.step()
        schedule.step()
    for (name, value), slow in zip(ours.state_dict().items(), [*backbone.state_dict().values(), *head.state_dict().values()]):
        torch.testing.assert_close(value, slow, msg=lambda text: f'{name}: {text}')


@pytest.mark.parametrize('name', ['resnet18', 'alexnet'])
def test_stages_of_the_papers_networks(name):
    "A ResNet with the stem for small pictures, and torchvision's AlexNet at 224: every stage gets a score, on ten crops."
    torch.manual_seed(0)
    net, size = (models.alexnet(), 224) if name == 'alexnet' else (ClusterNet(backbone='resnet18', stem='cifar', hidden=None, dim=512, classes=(2,)), 32)
    images = load_images('shapes', 'test', size=size).subset(range(12))
    scores = conv_probes(net, images, images.subset(range(2)), MultiCrop(preset='natural', n_local=0, global_size=size), epochs=1, batch_size=6, device='cpu')
    stages = [f'conv{i}' for i in range(1, 6)] if name == 'alexnet' else [f'layer{i}' for i in range(1, 5)]
    assert list(scores) == [f'{stage}_top1' for stage in stages] and set(scores.values()) <= {0., .5, 1.}


@pytest.mark.parametrize('protocol', SECTION)
def test_what_cannot_be_measured_is_refused(run, sets, protocol):
    from selfclass.hub import load_pretrained
    from selfclass.transfer import PROTOCOLS
    train, test = sets
    views, net = MultiCrop(preset='natural', n_local=0, global_size=16), load_pretrained(run)
    for pair in ((train.unlabelled, test), (train, test.unlabelled)):
        with pytest.raises(MissingLabelsError, match='has no labels'):
            PROTOCOLS[protocol](net, *pair, views, device='cpu')
    partly = ImageSet('partly', train.pixels, labels=np.where(np.arange(200) < 3, -1, train.labels))
    with pytest.raises(DataError, match='3 pictures without a class'):
        PROTOCOLS[protocol](net, partly, test, views, device='cpu')
    rare = from_arrays(np.zeros((41, 8, 8)), [0]*20 + [1]*20 + [2], name='rare')
    if protocol in ('few_shot', 'semi_supervised'):
        with pytest.raises(DataError, match='class 2'):
            PROTOCOLS[protocol](net, rare, rare, views, device='cpu', **{'few_shot': dict(shots=(2,)), 'semi_supervised': dict(shares=(.1, .2))}[protocol])


@pytest.mark.parametrize('protocol', SECTION)
def test_what_is_handed_in_by_mistake_is_named_in_one_line(run, sets, protocol):
    "A run for its network, arrays for a set, a mapping for views, and held-out classes that were never trained."
    from selfclass.hub import load_pretrained
    from selfclass.transfer import PROTOCOLS
    train, test = sets
    right = dict(net=load_pretrained(run), train=train, test=test, views=MultiCrop(preset='natural', n_local=0, global_size=16))
    for wrong, error, says in (
            ({'net': SimpleNamespace(net=right['net'])}, ParamsError, 'net should be a network, .* found SimpleNamespace; give its .net'),
            ({'train': train.pixels}, ParamsError, 'train should be an ImageSet, .* found Tensor'),
            ({'test': None}, ParamsError, 'test should be an ImageSet, .* found NoneType'),
            ({'views': right['views'].config}, ParamsError, 'views should be a MultiCrop, .* found dict'),
            ({'train': train.subset(np.flatnonzero(train.labels < 3))}, DataError, f"class 3 .*of the held-out '{test.name}' lacks a training picture in '{train.name}'; draw")):
        with pytest.raises(error, match=says) as caught:
            PROTOCOLS[protocol](**right | wrong, device='cpu')
        assert '\n' not in str(caught.value)
    if protocol != 'conv_probes':
        with pytest.raises(ParamsError, match='net should be a ClusterNet, .* found Tiny; conv_probes takes any network'):
            PROTOCOLS[protocol](**right | {'net': Tiny()}, device='cpu')


@pytest.mark.parametrize('protocol, numbers, says', [
    ('few_shot', dict(shots=5), 'shots should be a tuple, found 5; a single value is (5,)'), ('few_shot', dict(shots=('5',)), "shots should hold whole numbers, found '5'"),
    ('few_shot', dict(shots=()), 'shots=()'), ('few_shot', dict(draws=1.5), 'draws=1.5'), ('few_shot', dict(C='1'), "C='1'"),
    ('semi_supervised', dict(shares=.1), 'shares should be a tuple, found 0.1; a single value is (0.1,)'),
    ('semi_supervised', dict(shares=('1 %', '10 %')), "shares should hold numbers, found '1 %'"),
    ('semi_supervised', dict(lr=.02), 'lr should be a tuple'), ('semi_supervised', dict(lists='1percent.txt'), "found '1percent.txt'"),
    ('semi_supervised', dict(drops=12), 'drops should be a tuple, found 12'), ('conv_probes', dict(drops=5), 'drops should be a tuple, found 5'),
    ('conv_probes', dict(epochs='36'), "found '36', 192 and 0.01"), ('linear_eval', dict(lr=(.8,)), 'found 100, 4096 and (0.8,)'), ('linear_eval', dict(batch_size=64.), 'found 100, 64.0 and 0.8')])
def test_numbers_of_another_type_are_named_in_one_line(run, sets, protocol, numbers, says):
    from selfclass.hub import load_pretrained
    from selfclass.transfer import PROTOCOLS
    with pytest.raises(ParamsError) as caught:
        PROTOCOLS[protocol](load_pretrained(run), *sets, MultiCrop(preset='natural', n_local=0, global_size=16), device='cpu', **numbers)
    assert says in str(caught.value) and '\n' not in str(caught.value)


def test_the_stage_runs_on_its_default_cell(tmp_path):
    "After pretrain's default cell; the scores are flat, named as in the table of the notebook, and the same the second time."
    (tmp_path/'settings.ini').symlink_to(ROOT/'settings.ini')
    texts = []
    for stage in ('pretrain', 'probe', 'probe'):
        source = '\n'.join(source_of(c) for c in cells_of(ROOT/'nbs'/'pipeline'/f'{stage}.ipynb') if c['cell_type'] == 'code')
        ran = python('-c', source, cwd=tmp_path)
        assert ran.returncode == 0, f'{stage}: {ran.stderr[-3000:]}'
        file = tmp_path/'out'/'probe'/'selfclassifier'/'shapes.json'
        texts += [file.read_bytes()] if stage == 'probe' else []
    scores = load_json(file)['0']
    assert {'linear_crops_top1', 'conv1_top1', 'conv5_top1', 'semi_10pct_top1', 'few_shot_1_top1', 'few_shot_5_top1_sd', 'few_shot_5_centroid_top1'} <= set(scores)
    assert all(0 <= score <= 1 for score in scores.values()) and texts[0] == texts[1]
    assert not list((tmp_path/'.checkpoints').glob('probe/*/*'))
