"""SCLRE: attention and losses against slow twins, across processes, interruptions and the composition of the test batch."""
import math

import numpy as np
import pytest
import sclre_workers
import torch
import torch.nn.functional as F
from conftest import python

from selfclass.data import ImageSet
from selfclass.dist import launch
from selfclass.embed import assign_images, embed_images
from selfclass.errors import DataError, MissingLabelsError, ParamsError
from selfclass.hierarchy import superclass_report
from selfclass.taxonomy import superclass_labels, superclasses, with_superclasses
from selfclass.hub import load_pretrained, save_pretrained
from selfclass.model import ClusterNet
from selfclass.sclre import (CrossInstanceAttention, SclreNet, anchor_energy, anchor_loss, fill_reference, fit_crossentropy, fit_sclre, predict_in_batches,
                             sclre_loss, superclass_contrastive_loss, target_anchors)
from selfclass.train import save_run

RECIPE, METHODS = sclre_workers.RECIPE, sclre_workers.METHODS


def small(seed=0, **more):
    torch.manual_seed(seed)
    net = SclreNet(**(dict(attention=dict(heads=4, key_dim=8, reference=9), backbone='convnet', width=4, hidden=None, classes=(2,)) | more))
    net.anchors.copy_(target_anchors(2, net.dim))
    with torch.no_grad():
        net.attention.query.weight.mul_(100)                # as drawn, attention is even and all answers alike
    return fill_reference(net, plain(sclre_workers.stripes(9).pixels))


def plain(pixels):
    return pixels / 127.5 - 1


@pytest.mark.parametrize('n, dim, heads, key_dim', [(5, 6, 2, 3), (1, 8, 8, 1), (9, 4, 1, 7)])
def test_attention_equals_its_slow_twin(n, dim, heads, key_dim):
    torch.manual_seed(n)
    look, x = CrossInstanceAttention(dim, heads, key_dim, reference=4).double(), torch.randn(n, dim, dtype=torch.float64)
    query, key, value = (layer.weight.detach() for layer in (look.query, look.key, look.value))
    width, slow = dim // heads, torch.zeros(n, dim, dtype=torch.float64)
    for h in range(heads):
        wq, wk, wv = query[h * key_dim:(h + 1) * key_dim], key[h * key_dim:(h + 1) * key_dim], value[h * width:(h + 1) * width]
        for i in range(n):
            e = [math.exp((wq @ x[i]) @ (wk @ x[j]) / math.sqrt(key_dim)) for j in range(n)]
            slow[i, h * width:(h + 1) * width] = sum(e[j] / sum(e) * (wv @ x[j]) for j in range(n))
    torch.testing.assert_close(look(x), slow)
    look.reference.copy_(torch.randn(4, dim))
    alone = torch.stack([look.train().among(torch.cat([row[None], look.reference]), torch.cat([row[None], look.reference]))[0] for row in x])
    torch.testing.assert_close(look.eval()(x), alone)


@pytest.mark.parametrize('n, dim', [(2, 1), (3, 2), (10, 9), (4, 64), (129, 128)])
def test_anchors_are_a_regular_simplex(n, dim):
    t = target_anchors(n, dim, seed=5).double()
    dots = t @ t.T
    torch.testing.assert_close(dots, torch.where(torch.eye(n, dtype=bool), 1., -1 / (n - 1)).double(), atol=1e-6, rtol=0)
    assert anchor_energy(t).item() == pytest.approx(math.log(math.exp(2) + (n - 1) * math.exp(-2 / (n - 1))), abs=1e-5)
    g = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1.):
        assert anchor_energy(F.normalize(t + size * torch.randn(n, dim, generator=g), dim=1)) >= anchor_energy(t) - 1e-6          # nothing nearby is better


def test_more_superclasses_than_places_are_named():
    with pytest.raises(ParamsError, match='130 superclasses have no equally distant places in 128 dimensions, which hold 2 to 129; set dim to at least 129'):
        target_anchors(130, 128)
    many = ImageSet('many', sclre_workers.stripes().pixels, labels=np.arange(50) % 10)
    with pytest.raises(ParamsError, match='set dim to at least 9'):
        fit_sclre(many, **(RECIPE | METHODS['sclre'][1]))
    assert fit_sclre(many, **(RECIPE | METHODS['sclre'][1] | dict(epochs=2, model=RECIPE['model'] | dict(dim=16)))).net.classes == (10,)


@pytest.mark.parametrize('temp', [.5, .1])
def test_loss_equals_its_slow_twin(temp):
    g = torch.Generator().manual_seed(0)
    v, logits, y = F.normalize(torch.randn(11, 6, generator=g), dim=1).double(), torch.randn(11, 3, generator=g).double(), torch.randint(0, 3, (11,), generator=g)
    anchors, e = target_anchors(3, 6).double(), [[math.exp((a @ b).item() / temp) for b in v] for a in v]
    contrast = -sum(math.log(e[i][j] / (e[i][j] + sum(e[i][k] for k in range(11) if y[k] != y[i]))) for i in range(11) for j in range(11) if j != i and y[j] == y[i]) / 22
    towards = np.mean([-math.log(math.exp((v[i] @ anchors[y[i]]).item() / temp) / sum(math.exp((v[i] @ t).item() / temp) for t in anchors)) for i in range(11)])
    entropy = np.mean([-math.log(math.exp(logits[i, y[i]] / .3) / sum(math.exp(s / .3) for s in logits[i])) for i in range(11)])
    assert superclass_contrastive_loss(v, y, temp).item() == pytest.approx(contrast, rel=1e-9)
    assert anchor_loss(v, anchors, y, temp).item() == pytest.approx(towards, rel=1e-6)
    assert sclre_loss(v, logits, anchors, y, .3, .9, .7, temp, .3).item() == pytest.approx(.3 * contrast + .9 * entropy + .7 * towards, rel=1e-6)


@pytest.mark.parametrize('labels', [[1, 1, 1, 1], [0], [0, 1, 2], [2, 2]], ids=['one superclass', 'one image', 'no pair', 'one pair alone'])
@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_batches_without_a_comparison_are_no_trouble(labels, reduction):
    v, y = F.normalize(torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(1)), dim=1).requires_grad_(), torch.tensor(labels)
    loss = superclass_contrastive_loss(v, y, reduction=reduction)
    loss.backward()
    assert loss.item() == 0 and v.grad.abs().max() == 0
    whole = sclre_loss(v, v @ torch.ones(4, 3), target_anchors(3, 4), y, reduction=reduction)
    assert torch.isfinite(whole) and torch.isfinite(torch.autograd.grad(whole, v)[0]).all()


def test_zero_attention_output_has_finite_gradients():
    net = small().train()
    with torch.no_grad():
        net.attention.value.weight.zero_()
    z, = net.embed([plain(sclre_workers.stripes(6).pixels)])
    loss = sclre_loss(z, net.heads[0](z), net.anchors, torch.tensor([0, 1, 0, 1, 0, 1]))
    loss.backward()
    assert z.abs().max() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_a_prediction_does_not_depend_on_its_test_batch():
    net, images = small(), sclre_workers.stripes(40)
    whole, ids = embed_images(net, images, plain), assign_images(net, images, plain)
    for batch_size in (1, 7, 40):
        parts = embed_images(net, images, plain, batch_size=batch_size)
        for name in whole:
            np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-5, err_msg=name)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(assign_images(net, images.subset(order), plain, batch_size=3), ids[:, order])
    batches = np.stack([predict_in_batches(net, images, plain, 4, seed) for seed in range(10)])
    assert (batches != batches[0]).any(), "the published protocol does depend on it"


def test_looking_in_batches_leaves_no_trace():
    net, images = small(), sclre_workers.stripes(21)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.train(False).modules()]
    ids = predict_in_batches(net, images, plain, 8, seed=2)
    assert ids.shape == (21,) and all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and modes == [m.training for m in net.modules()]
    order = np.random.default_rng(2).permutation(21)                    # the last batch, by hand: five images and three from the front
    last = np.append(order[16:], order[:3])
    with torch.no_grad():
        by_hand = net.train()(plain(images.pixels[torch.from_numpy(last)]))[0].argmax(1)
    np.testing.assert_array_equal(ids[last[:5]], by_hand[:5])
    with pytest.raises(ParamsError, match='at least 2'):
        predict_in_batches(net, images, plain, 1)


def test_gradients_of_two_processes_are_those_of_one():
    loss, weights, inputs = sclre_workers.loss_and_gradients()
    results = launch(sclre_workers.loss_and_gradients, processes=2)
    for theirs, _, _ in results:
        assert theirs == pytest.approx(loss, rel=1e-12)
    for i, alone in enumerate(weights):
        torch.testing.assert_close(sum(result[1][i] for result in results) / 2, alone)          # what data-parallel averaging makes of them
    torch.testing.assert_close(sum(result[2] for result in results) / 2, inputs)


@pytest.mark.parametrize('method', METHODS)
def test_two_processes_train_as_one(method):
    losses, head_loss, weights, answers = sclre_workers.train(method)
    for theirs, their_head_loss, their_weights, their_answers in launch(sclre_workers.train, method, processes=2):
        np.testing.assert_allclose(theirs, losses, rtol=2e-4)
        np.testing.assert_allclose(their_head_loss, head_loss, rtol=2e-3)
        for name in weights:
            torch.testing.assert_close(their_weights[name], weights[name], rtol=2e-3, atol=2e-4, msg=lambda text: f'{name}: {text}')
        assert list(their_answers) == list(answers)
        for name, value in answers.items():
            same = np.mean(np.asarray(their_answers[name]) == np.asarray(value))
            assert same == 1 if 'pred' not in name else same >= .9, name                            # rounding may turn an image that stands between two superclasses


PROGRAM = '''
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from selfclass import sclre, train
from sclre_workers import METHODS, RECIPE, stripes
class Mortal(train.Checkpoint):
    "A checkpoint after whose second writing the power fails, once."
    def save(self, epoch):
        super().save(epoch)
        if epoch == 3 and os.environ.get("POWER_FAILS"): os._exit(9)
sclre.Checkpoint = Mortal
(method, out, state), images = sys.argv[1:], stripes()
fit, more = METHODS[method]
run = fit(images, **(RECIPE | more | dict(epochs=7, held_out=stripes(21), predict_every=3, checkpoint_every=2, checkpoints=None if state.endswith("none") else Path(state))))
train.save_run(run, out, seed=3)
'''


@pytest.mark.parametrize('method', METHODS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, method):
    program, here = tmp_path/'train.py', {'PYTHONPATH': f'{sclre_workers.__file__.rsplit("/tests/", 1)[0]}:{sclre_workers.__file__.rsplit("/", 1)[0]}'}
    program.write_text(PROGRAM)
    whole = python(program, method, tmp_path/'whole', tmp_path/'none', **here)
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = python(program, method, tmp_path/'killed', tmp_path/'state', POWER_FAILS='yes', **here)
    assert killed.returncode == 9 and (tmp_path/'state'/'last.pt').exists() and not (tmp_path/'killed').exists()
    resumed = python(program, method, tmp_path/'resumed', tmp_path/'state', **here)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in ('model.safetensors', 'config.json', 'log.csv', 'predictions.npz', 'superclasses.npz'):
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'resumed'/name).read_bytes(), name
    assert not (tmp_path/'state').exists(), 'a finished run leaves no checkpoint'


@pytest.mark.parametrize('method', METHODS)
def test_superclasses_are_learned_and_the_folder_gives_the_answers_back(tmp_path, method):
    fit, more = METHODS[method]
    images = sclre_workers.stripes(200)
    train, test = images.subset(range(160)), images.subset(range(160, 200))
    run = fit(train, held_out=test, **(RECIPE | more | dict(epochs=15, model=dict(backbone='convnet', width=8, hidden=None), views=dict(preset='glyphs', n_global=1, n_local=0, global_size=8, rotation=0., shear=0.),
                                                            optimizer=dict(name='adamw', lr=.01))))
    save_run(run, tmp_path)
    scores = superclass_report(tmp_path/'superclasses.npz')
    assert scores['acc'] > .9 and scores['acc_train'] > .9 and scores['acc_batch'] > .8 and scores['early/proportion'] == scores['late/proportion'] == .5
    net = load_pretrained(tmp_path)
    assert type(net) is (SclreNet if method == 'sclre' else ClusterNet)
    np.testing.assert_array_equal(assign_images(net, test, run.loader.views.plain)[0], np.load(tmp_path/'superclasses.npz')['test_pred'])
    assert run.record.rows[-1]['loss'] < run.record.collapse and run.head_loss[0] < math.log(2)


def test_both_start_from_the_same_backbone():
    "The baseline differs by the method alone: its weights before training are those of SCLRE."
    recipe = RECIPE | dict(epochs=2, optimizer=dict(name='sgd', lr=0.), views=RECIPE['views'] | dict(n_global=1))
    ours, baseline = (fit(sclre_workers.stripes(), **(recipe | more)).net.state_dict() for fit, more in METHODS.values())
    for name, value in baseline.items():
        if 'running' not in name:
            assert torch.equal(value, ours[name]), name
    assert set(ours) - set(baseline) == {'attention.query.weight', 'attention.key.weight', 'attention.value.weight', 'attention.reference', 'anchors'}


def test_saved_networks_of_both_classes(tmp_path):
    net = small()
    again = load_pretrained(save_pretrained(net, tmp_path/'one', note='x'))
    x = plain(sclre_workers.stripes(5).pixels)
    torch.testing.assert_close(again(x), net.eval()(x), rtol=0, atol=0)
    assert (save_pretrained(again, tmp_path/'two', note='x')/'model.safetensors').read_bytes() == (tmp_path/'one'/'model.safetensors').read_bytes()
    config = tmp_path/'one'/'config.json'
    assert '"class": "sclre.SclreNet"' in config.read_text()
    config.write_text(config.read_text().replace('sclre.SclreNet', 'core.seed_everything'))
    with pytest.raises(DataError):
        load_pretrained(tmp_path/'one')
    torch.manual_seed(0)
    save_pretrained(ClusterNet('convnet', width=4, hidden=None, classes=(3,)), tmp_path/'old')
    assert '"class"' not in (tmp_path/'old'/'config.json').read_text() and type(load_pretrained(tmp_path/'old')) is ClusterNet


@pytest.mark.parametrize('fit', [fit_sclre, fit_crossentropy])
def test_labels_are_asked_for(fit):
    images = sclre_workers.stripes()
    with pytest.raises(MissingLabelsError, match='stripes has no labels, and superclasses are learned from labels'):
        fit(images.unlabelled, **RECIPE)
    with pytest.raises(DataError, match='found no image of late'):
        fit(images.subset(np.flatnonzero(images.labels == 0)), **RECIPE)
    with pytest.raises(DataError, match='fewer than one batch'):
        fit(images.subset([0, 1, 2, 3]), **RECIPE)
    with pytest.raises(ParamsError, match='model.classes is not a parameter'):
        fit(images, **(RECIPE | dict(model=dict(backbone='convnet', classes=(2,)))))


def test_a_folder_tree_gets_superclasses_from_a_file(tmp_path):
    from PIL import Image

    from selfclass.data import load_images
    for name, grey in (('bottle', 10), ('orchid', 90), ('rose', 150), ('road', 200)):
        (tmp_path/'photos'/name).mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (8, 8), (grey + i,) * 3).save(tmp_path/'photos'/name/f'{i}.png')
    (tmp_path/'garden.yaml').write_text('flowers: [orchid, rose]\nbottles: [bottle]\nleave_out: [road]\n')
    images = with_superclasses(load_images(tmp_path/'photos'), tmp_path/'garden.yaml')
    assert images.class_names == ('flowers', 'bottles') and len(images) == 9 and sorted(images.labels.tolist()) == [0] * 6 + [1] * 3
    (tmp_path/'garden.yaml').write_text('flowers: [orchid, rose]\nbottles: [bottle, rose]\nleave_out: [road]\n')
    with pytest.raises(ParamsError, match="'rose' stands in 'flowers' and in 'bottles'"):
        with_superclasses(load_images(tmp_path/'photos'), tmp_path/'garden.yaml')


@pytest.mark.parametrize('level, sizes', [('cifar100-3', [18, 42, 40]), ('cifar100-4', [30, 20, 20, 30]), ('cifar100-7', [10, 15, 30, 10, 15, 10, 10])])
def test_the_papers_superclasses_from_fine_labels(level, sizes):
    fine = superclasses(level).leaf_names
    images = with_superclasses(ImageSet('cifar100', torch.zeros(200, 3, 4, 4, dtype=torch.uint8), labels=np.arange(200) % 100, class_names=fine), level)
    assert (np.bincount(images.labels) / 2).tolist() == sizes and images.class_names == superclasses(level).names
    assert superclass_labels(None, fine, level).doubt == superclasses(level).doubt
