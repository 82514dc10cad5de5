"""SCAN: its losses beside slow twins, across processes and interruptions, and what it says of recipes that cannot work."""
import csv
import math

import numpy as np
import pytest
import scan_workers
import torch
from conftest import python
from scan_workers import GLYPHS, RECIPE, stripes

from selfclass.augment import MultiCrop
from selfclass.data import ImageSet
from selfclass.dist import launch
from selfclass.errors import DataError, ParamsError
from selfclass.hub import load_pretrained
from selfclass.model import ClusterNet
from selfclass.scan import (ConfidenceLog, NeighbourLoader, clustering_step, confident_labels, confident_loss, derive_scan, fit_scan, instance_loss, look_at,
                            mine_neighbours, neighbour_accuracy, scan_from, scan_loss, scan_losses, scan_terms, selflabel_step, simclr_loss)
from selfclass.train import save_run


def logits(n=9, c=4, seed=0):
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed))


def probabilities(x, temp):
    return [[math.exp(s / temp) / sum(math.exp(t / temp) for t in row) for s in row] for row in x.tolist()]


@pytest.mark.parametrize('prior', [None, [.4, .3, .2, .1]])
@pytest.mark.parametrize('temp', [1., .3])
def test_scan_loss_equals_its_slow_twin(temp, prior):
    a, b = logits(), logits(seed=1)
    p, q, shares = probabilities(a, temp), probabilities(b, temp), prior or [.25] * 4
    consistency = -sum(math.log(sum(u * v for u, v in zip(x, y))) for x, y in zip(p, q)) / 9
    mean = [sum(column) / 9 for column in zip(*p)]
    divergence = sum(m * math.log(m / s) for m, s in zip(mean, shares))
    assert scan_loss(a, b, 2., temp, prior).item() == pytest.approx(consistency + 2. * divergence, rel=1e-5)
    eq2 = consistency + 2. * sum(m * math.log(m) for m in mean)
    assert scan_loss(a, b, 2., temp).item() == pytest.approx(eq2 + 2. * math.log(4), rel=1e-5)


def test_scan_loss_is_finite_where_probabilities_vanish():
    "Certain answers that contradict each other, and a class that nobody takes: log <p, q> and log m stay numbers, with gradients."
    a = torch.tensor([[300., 0., 0.], [300., 0., 0.]], requires_grad=True)
    loss = scan_loss(a, torch.tensor([[0., 300., 0.], [300., 0., 0.]]), 5., 1.)
    loss.backward()
    assert loss.item() == pytest.approx((300 - math.log(2)) / 2 + 5 * math.log(3), rel=1e-5) and a.grad.isfinite().all()


def test_losses_are_float32_under_autocast():
    z, other = (torch.nn.functional.normalize(logits(8, 16, seed), dim=1) for seed in (0, 1))
    others = torch.nn.functional.normalize(torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0)), dim=2)
    plain = simclr_loss([z, other]), scan_loss(z, other), instance_loss(z, other, others, 2., 50), confident_loss(z, torch.arange(8))
    with torch.autocast('cpu', torch.bfloat16):
        cast = simclr_loss([z, other]), scan_loss(z, other), instance_loss(z, other, others, 2., 50), confident_loss(z, torch.arange(8))
    assert all(x.dtype == torch.float32 for x in cast)
    torch.testing.assert_close(torch.stack(cast), torch.stack(plain), rtol=0, atol=0)


def test_weights_of_confident_images_are_those_of_the_paper():
    "n / count of each image's cluster, with the weighted mean of cross-entropy."
    strong, labels = logits(8), torch.tensor([0, 0, 0, 1, 1, 3, -1, -1])
    weight = torch.tensor([6 / 3, 6 / 2, 1., 6 / 1])
    wanted = torch.nn.functional.cross_entropy(strong[:6] / .1, labels[:6], weight)
    torch.testing.assert_close(confident_loss(strong, labels), wanted)
    torch.testing.assert_close(confident_loss(strong, labels, balanced=False), torch.nn.functional.cross_entropy(strong[:6] / .1, labels[:6]))
    assert confident_labels(torch.zeros(2, 2), .5).tolist() == [-1, -1], 'the threshold itself is not passed'


def test_two_processes_compute_the_losses_of_one():
    alone = scan_workers.losses()
    for number, theirs in enumerate(launch(scan_workers.losses, processes=2)):
        for name, (value, gradient) in theirs.items():
            assert value == pytest.approx(alone[name][0], rel=1e-5), name
            torch.testing.assert_close(gradient, alone[name][1][number::2], rtol=1e-4, atol=1e-6, msg=lambda text: f'{name}: {text}')


def test_two_processes_keep_one_bank_and_find_one_table():
    bank, partition, others, table = scan_workers.bank_and_neighbours()
    for number, (their_bank, their_partition, theirs, their_table) in enumerate(launch(scan_workers.bank_and_neighbours, processes=2)):
        torch.testing.assert_close(their_bank, bank)
        torch.testing.assert_close(their_partition, partition)
        assert torch.equal(theirs, others[number::2]) and torch.equal(their_table, table)


def test_two_processes_look_at_an_odd_number_of_images_in_their_order():
    alone, brightness = scan_workers.looked_at()
    assert len(alone) % 2 and torch.allclose(alone[:, 0], brightness)
    for theirs, _ in launch(scan_workers.looked_at, processes=2):
        assert torch.equal(theirs, alone)


@pytest.mark.parametrize('task', ['simclr', 'nce', 'rotation'])
def test_two_processes_train_as_one(task):
    alone = scan_workers.train(task)
    for theirs in launch(scan_workers.train, task, processes=2):
        np.testing.assert_allclose([row['loss'] for row in theirs['pretext']], [row['loss'] for row in alone['pretext']], rtol=1e-5)
        np.testing.assert_allclose([row['loss'] for row in theirs['rows']], [row['loss'] for row in alone['rows']], rtol=2e-3)
        np.testing.assert_allclose(theirs['head_loss'], alone['head_loss'], rtol=2e-3)
        assert theirs['heads']['kept'] == alone['heads']['kept'] and torch.equal(theirs['neighbours'], alone['neighbours'])
        assert theirs['confident'] == alone['confident'] and [row['usage_entropy'] for row in theirs['rows']] == [row['usage_entropy'] for row in alone['rows']]
        for name, weight in alone['weights'].items():
            torch.testing.assert_close(theirs['weights'][name], weight, rtol=2e-3, atol=1e-3, msg=lambda text: f'{name}: {text}')


PROGRAM = '''
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from selfclass import scan, train
from scan_workers import RECIPE, PRETEXTS, stripes
class Mortal(train.Checkpoint):
    "A checkpoint after a writing of which the power fails, in the phase and epoch that the environment names."
    def save(self, epoch):
        super().save(epoch)
        if os.environ.get("POWER_FAILS") == f"{self.file and self.file.parent.name} {epoch}": os._exit(9)
scan.Checkpoint = Mortal
images, (out, state) = stripes(), map(Path, sys.argv[1:])
run = scan.fit_scan(images, **(RECIPE | dict(pretext=PRETEXTS["nce"], held_out=images.subset(range(20)), predict_every=3, checkpoint_every=2,
                                             checkpoints=None if state.name == "none" else state)))
train.save_run(run, out, seed=3)
'''
FILES = ('model.safetensors', 'config.json', 'log.csv', 'predictions.npz', 'neighbours.npz', 'heads.json', 'before_selflabel.npz', 'pretext.csv', 'confident.csv',
         'prototypes.csv', 'uncertain.csv')


def test_killed_in_any_phase_and_resumed_equals_uninterrupted(tmp_path):
    program, here = tmp_path/'train.py', {'PYTHONPATH': f'{scan_workers.__file__.rsplit("/tests/", 1)[0]}:{scan_workers.__file__.rsplit("/", 1)[0]}'}
    program.write_text(PROGRAM)
    whole = python(program, tmp_path/'whole', tmp_path/'none', **here)
    assert whole.returncode == 0, whole.stderr[-2000:]
    for moment in ('pretext 1', 'clustering 1', 'selflabel 1'):
        killed = python(program, tmp_path/'run', tmp_path/'state', POWER_FAILS=moment, **here)
        assert killed.returncode == 9 and (tmp_path/'state'/moment.split()[0]/'last.pt').exists(), killed.stderr[-2000:]
    resumed = python(program, tmp_path/'run', tmp_path/'state', **here)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in FILES:
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'run'/name).read_bytes(), name
    assert not (tmp_path/'state').exists(), 'a finished run leaves no checkpoint'


@pytest.fixture(scope='module')
def run():
    return fit_scan(stripes(), **RECIPE)


def test_a_run_and_its_files(run, tmp_path):
    folder = save_run(run, tmp_path/'run', recipe={'views': GLYPHS})
    assert run.net.classes == (3, 5) and run.heads['classes'] == [3, 3, 5] and len(run.heads['kept']) == len(run.head_loss) == 2
    with open(folder/'log.csv') as file:
        log = list(csv.DictReader(file))
    assert [row['phase'] for row in log] == ['clustering'] * 4 + ['selflabel'] * 3 and [row['epoch'] for row in log] == [str(i) for i in range(1, 8)]
    assert all(float(row['confident']) > 0 for row in log[4:]) and [len(row) for row in log] == [len(log[0])] * 7
    before, after = np.load(folder/'before_selflabel.npz')['train'], np.load(folder/'predictions.npz')['train'][-1]
    assert before.shape == after.shape == (2, 50) and before.dtype == after.dtype
    assert torch.equal(torch.from_numpy(np.load(folder/'neighbours.npz')['index']).long(), run.neighbours)
    assert {row['image'] for row in run.uncertain if row['head'] == 0} == set(range(50)), 'all images, since there are fewer than a hundred'
    assert all(run.record.ids['train'][-1][row['head']][row['image']] == row['cluster'] for row in run.prototypes)
    derived = scan_from(folder, stripes(), classes=(3,), clustering=RECIPE['clustering'] | dict(epochs=1), batch_size=16, device='cpu')
    assert derived.net.classes == (3,) and not derived.before and load_pretrained(folder).classes == (3, 5)


def test_features_of_another_run_are_the_ones_that_are_mined(run):
    "scan_from with no training to speak of: its neighbours are those of the embeddings of the network that it was given, whose weights stay."
    weights = {name: value.clone() for name, value in run.net.state_dict().items()}
    derived = scan_from(run.net, stripes(), classes=(3, 4), views=GLYPHS, clustering=RECIPE['clustering'], neighbours=dict(k=4), batch_size=16, device='cpu')
    crop = MultiCrop(**GLYPHS)
    assert torch.equal(derived.neighbours, mine_neighbours(look_at(run.net, stripes(), crop.plain, lambda x: run.net.embed([x])[0]), 4))
    assert all(torch.equal(value, weights[name]) for name, value in run.net.state_dict().items()) and derived.net.classes == (3, 4)


def test_a_frozen_backbone_stays(run):
    derived = scan_from(run.net, stripes(), classes=(3, 5), views=GLYPHS, clustering=RECIPE['clustering'] | dict(frozen=True), batch_size=16, device='cpu')
    for name, value in run.net.state_dict().items():
        assert name.startswith('heads') or torch.equal(value, derived.net.state_dict()[name]), name
    assert all(p.requires_grad for p in derived.net.parameters())


def test_the_stage_derive_gets_a_run_and_arrays(run, tmp_path):
    folder = save_run(run, tmp_path/'start', recipe={'views': GLYPHS})
    recipe = dict(classes=(3, 4), clustering=RECIPE['clustering'], neighbours=dict(k=4), loss=RECIPE['loss'], batch_size=16, device='cpu')
    derived = derive_scan(stripes(), stripes(20), folder, tmp_path/'derived', **recipe)
    assert derived.classes == (3, 4) and derived.head_loss.shape == (2,) and derived.splits['test']['probs_1'].shape == (20, 4)
    assert load_pretrained(tmp_path/'derived').facts['recipe']['views']['preset'] == 'glyphs' and (tmp_path/'derived'/'neighbours.npz').exists()
    last = np.load(tmp_path/'derived'/'predictions.npz')['test'][-1]
    assert (derived.splits['test']['probs_0'].argmax(1) == last[0]).all()
    for source in (None, tmp_path/'features.npz'):
        with pytest.raises(ParamsError, match='starts from a network'):
            derive_scan(stripes(), stripes(20), source, tmp_path/'none', **recipe)
    with pytest.raises(ParamsError, match="neighbors.*did you mean 'neighbours'"):
        derive_scan(stripes(), stripes(20), folder, tmp_path/'none', **(recipe | dict(neighbors={})))


def test_no_neighbours_is_the_image_in_another_view():
    images = stripes()
    loader = NeighbourLoader(images, MultiCrop(**(GLYPHS | dict(n_global=1))), 16, 0, neighbours=mine_neighbours(torch.randn(50, 4), 0))
    index, (mine, partner) = loader[0]
    assert torch.equal(loader.partners.order(0, 0), loader.order(0, 0)) and not torch.equal(mine, partner)
    recipe = RECIPE | dict(neighbours=dict(k=0), selflabel=None, clustering=RECIPE['clustering'] | dict(epochs=1))
    assert fit_scan(images, **recipe).neighbours.tolist() == [[i] for i in range(50)]


def test_files_that_are_decoded_on_the_way(tmp_path):
    "Pictures in files, decoded by a worker process, through all three phases."
    from PIL import Image
    for i, picture in enumerate(stripes(20).pixels):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path/f'{i:02}.png')
    images = ImageSet('files', files=tuple(sorted(tmp_path.glob('*.png'))))
    natural = dict(preset='natural', n_global=2, n_local=0, global_size=8)
    recipe = RECIPE | dict(views=natural, batch_size=10, selflabel=RECIPE['selflabel'] | dict(epochs=1, threshold=.35, views=natural))
    for section in ('pretext', 'clustering'):
        recipe[section] = recipe[section] | dict(epochs=1, schedule={})
    alone, worked = (fit_scan(images, **recipe, workers=workers) for workers in (0, 1))
    assert [row['loss'] for row in alone.record.rows] == [row['loss'] for row in worked.record.rows] and torch.equal(alone.neighbours, worked.neighbours)


def test_steps_without_confident_images_are_skipped_and_counted():
    "The mask of a batch may be empty: nothing moves, not even the momentum, and the run goes on."
    torch.manual_seed(0)
    net, log, batch = ClusterNet(**RECIPE['model']), ConfidenceLog(3), (torch.arange(8), [torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)])
    optimizer = torch.optim.AdamW(net.parameters(), lr=.1, weight_decay=.1)
    for threshold, moves in ((.3, True), (.9999, False)):
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.zero_grad(set_to_none=True)
        loss = selflabel_step(net, log, threshold)(batch)
        loss.backward()
        optimizer.step()
        assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), before)) == moves
    assert loss.item() == 0 and log.skipped == 1
    confident = fit_scan(stripes(), **(RECIPE | dict(selflabel=RECIPE['selflabel'] | dict(batch_size=2, epochs=2, optimizer=dict(name='sgd', lr=1e-9)))))
    assert [row['seen'] for row in confident.confident] == [50, 50] and len(confident.record.rows) == 6


def test_mistakes_are_named_before_anything_is_trained(monkeypatch):
    def trained(*args, **kwargs):
        raise AssertionError('training began')
    monkeypatch.setattr('selfclass.scan.fit', trained)
    for changed, said in [
            (dict(model=RECIPE['model'] | dict(classes=(3, 51))), '51 clusters cannot be filled by 50 images; lower classes to at most 50'),
            (dict(neighbours=dict(k=50)), 'neighbours.k should be 0 to 49, one less than the 50 images, found 50'),
            (dict(neighbours=dict(n=5)), 'neighbours.n is not a parameter'),
            (dict(neighbours=dict(features='pixels')), "neighbours.features should be .*found 'pixels'"),
            (dict(selflabel=RECIPE['selflabel'] | dict(threshold=1.)), 'selflabel.threshold should lie between 0 and 1, found 1.0; 0.99 is usual'),
            (dict(selflabel=RECIPE['selflabel'] | dict(treshold=.9)), "selflabel.treshold .*did you mean 'threshold'"),
            (dict(clustering=RECIPE['clustering'] | dict(prior=[.5, .5])), 'prior has 2 entries'),
            (dict(clustering=RECIPE['clustering'] | dict(prior=[.5, .6, .2])), 'prior should sum to 1'),
            (dict(clustering=dict(optimizer=RECIPE['clustering']['optimizer'])), "clustering lacks the key 'epochs'"),
            (dict(clustering=RECIPE['clustering'] | dict(schedule=dict(warmup=3))), "clustering.schedule.warmup .*did you mean 'warmup_epochs'"),
            (dict(clustering=RECIPE['clustering'] | dict(views=dict(preset='glyph'))), "'glyph' is unknown; did you mean 'glyphs'"),
            (dict(pretext=RECIPE['pretext'] | dict(task='moco')), "pretext.task 'moco' is unknown"),
            (dict(pretext=RECIPE['pretext'] | dict(negatives=5)), 'pretext.negatives is not a parameter'),
            (dict(pretext=RECIPE['pretext'] | dict(optimizer=dict(name='sgd'))), 'has no learning rate'),
            (dict(loss=dict(temp=.1)), 'loss.temp is not a parameter'), (dict(loss=dict(row_temp=0.)), 'row_temp should be above 0')]:
        with pytest.raises(ParamsError, match=said):
            fit_scan(stripes(), **(RECIPE | changed))
    with pytest.raises(DataError, match='fewer than one batch'):
        fit_scan(ImageSet('few', stripes().pixels[:12]), **RECIPE)


def test_a_threshold_that_no_image_passes_is_named_before_self_labelling():
    with pytest.raises(ParamsError, match=r'selflabel.threshold 0.99999 is passed by none of 50 images, the highest confidence is 0\.\d+; with 0\.\d+ half of them would'):
        fit_scan(stripes(), **(RECIPE | dict(selflabel=RECIPE['selflabel'] | dict(threshold=.99999))))


@pytest.mark.parametrize('value, said', [(math.nan, 'NaN or infinity'), (math.inf, 'NaN or infinity'), (0., 'only zeros')])
def test_features_without_neighbours_are_named(value, said):
    features = logits(30, 6)
    features[7], features[20] = value, value
    with pytest.raises(DataError, match=f'{said} in 2 of 30 rows, the first in row 7; lower the learning rate'):
        mine_neighbours(features, 3)


def test_neighbours_do_not_depend_on_blocks_or_lengths():
    features = logits(90, 8)
    whole = mine_neighbours(features, 6)
    assert torch.equal(mine_neighbours(features, 6, chunk=7), whole) and torch.equal(mine_neighbours(features * torch.arange(1, 91)[:, None], 6), whole)
    cosines = torch.nn.functional.normalize(features.double(), dim=1)
    cosines = (cosines @ cosines.T).fill_diagonal_(-2)
    assert torch.equal(whole[:, 1:], cosines.topk(6).indices) and torch.equal(whole[:, 0], torch.arange(90))
    twins = features.clone()
    twins[5] = twins[3]
    assert mine_neighbours(twins, 1)[[3, 5]].tolist() == [[3, 5], [5, 3]], 'an image that is there twice is no neighbour of itself'


def test_over_clustering_and_choice():
    "Heads of other sizes train beside, the choice is by size and by loss, and the loss of a head is that of eq. 2 with weight 1 over all images."
    torch.manual_seed(0)
    net, images = ClusterNet('convnet', width=4, hidden=None, classes=(4, 9)), stripes(48)
    loader = NeighbourLoader(images, MultiCrop(**(GLYPHS | dict(n_global=1))), 16, 0, neighbours=mine_neighbours(torch.randn(48, 4), 3))
    found = scan_losses(net, loader, repeats=1)
    with torch.no_grad():
        anchors, partners = [], []
        net.eval()
        loader.set_epoch(1_000_000)
        for _, (a, b) in loader:
            heads = net.classify(net.embed([a, b]))
            anchors.append([head[0] for head in heads]), partners.append([head[1] for head in heads])
    for h in range(2):
        assert found[h] == pytest.approx(scan_loss(torch.cat([a[h] for a in anchors]), torch.cat([b[h] for b in partners]), 1.).item(), abs=1e-5)
    loss = clustering_step(net.train(), entropy_weight=2.)(loader[0])
    heads = net.classify(net.embed(loader[0][1]))
    assert loss.item() == pytest.approx(np.mean([scan_loss(*head, 2.).item() for head in heads]), rel=1e-5)


def test_accuracy_of_neighbours_needs_labels_only_afterwards():
    table = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    assert neighbour_accuracy(table, [0, 0, 1]) == pytest.approx(2 / 6) and neighbour_accuracy(table, [0, 0, -1]) == 1
    with pytest.raises(DataError, match='nothing to compare'):
        neighbour_accuracy(table, [-1, -1, -1])
    with pytest.raises(DataError, match='a label for each row'):
        neighbour_accuracy(table, [0, 1])


@pytest.mark.parametrize('batch, classes', [(4, 10), (9, 10), (10, 10), (3, 200)])
def test_a_batch_smaller_than_the_classes_has_a_floor(batch, classes):
    "Certain answers, each another class: nothing spreads B images over C classes better, and log(C/B) of the divergence remains."
    logits = 100. * torch.eye(classes)[:batch]
    consistency, divergence = scan_terms(logits, logits)
    torch.testing.assert_close(divergence, torch.tensor(math.log(classes / batch)), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(consistency, torch.tensor(0.), atol=1e-6, rtol=0)
    other = 100. * torch.eye(classes)[torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(0))]
    assert scan_terms(other, other)[1] >= divergence - 1e-6


def test_a_refused_threshold_keeps_the_clustered_network(tmp_path):
    "Two phases of training are not lost to one number: the network lies beside the checkpoints and opens."
    with pytest.raises(ParamsError, match='The clustered network is kept in') as refused:
        fit_scan(stripes(), **(RECIPE | dict(selflabel=RECIPE['selflabel'] | dict(threshold=.999999), checkpoints=tmp_path/'state')))
    kept = load_pretrained(tmp_path/'state'/'clustered')
    assert str(tmp_path/'state'/'clustered') in str(refused.value) and kept.classes == (3, 5), 'the better head of each size'
