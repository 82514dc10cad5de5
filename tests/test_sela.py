"""SeLa: labels by optimal transport, checked against a linear programme, across blocks, processes and interruptions."""
import math

import numpy as np
import pytest
import sela_workers
import torch
from conftest import python
from scipy.optimize import linear_sum_assignment, linprog

from selfclass.data import ImageSet
from selfclass.dist import launch
from selfclass.errors import DataError, ParamsError
from selfclass.sela import (HeadRows, assign_labels, balanced_sizes, first_labels, fit_sela, label_shares, round_balanced, save_labels, self_label_loss,
                            self_labels, sinkhorn)
from selfclass.train import save_run

PROBLEMS = [(12, 3, None, 0), (20, 4, None, 1), (13, 5, None, 2), (24, 3, [.5, .25, .25], 3), (7, 7, None, 4)]


def least_cost(z, share):
    "Least <Q, -Z> over the transport polytope, by scipy's linear programme."
    n, k = z.shape
    sums = np.concatenate([np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))])
    return linprog(-z.numpy().ravel(), A_eq=sums, b_eq=np.concatenate([np.full(n, 1 / n), share])).fun


def plan(z, lam, **more):
    scaling = sinkhorn(z, lam, tol=1e-7, max_iter=20_000, **more)
    assert scaling.errors[-1] <= 1e-7
    return (lam * z + scaling.log_scale).softmax(1) / len(z)


@pytest.mark.parametrize('lam', [1., 6.])
@pytest.mark.parametrize('n, k, prior, seed', PROBLEMS)
def test_transport_is_the_linear_programme_up_to_the_entropic_gap(n, k, prior, seed, lam):
    "0 <= cost of Q - least cost <= log(K) / lam: the entropies of two plans with the same N equal columns differ by at most log K."
    z = sela_workers.rows(n, k, seed)
    q, share = plan(z, lam, prior=prior), label_shares(k, prior)
    torch.testing.assert_close(q.sum(0), share, rtol=1e-6, atol=0)
    torch.testing.assert_close(q.sum(1), torch.full((n,), 1 / n, dtype=torch.float64), rtol=1e-12, atol=0)
    gap = -(q * z).sum().item() - least_cost(z, share.numpy())
    assert -1e-6 < gap <= math.log(k) / lam


@pytest.mark.parametrize('dtype, tol', [('float32', 1e-5), ('float64', 1e-9)])
@pytest.mark.parametrize('prior', [None, [.4, .2, .1, .1, .1, .1]])
def test_marginals_are_met(dtype, tol, prior):
    z, share = sela_workers.rows(400), label_shares(6, prior)
    scaling = sinkhorn(z, 10., prior, tol=tol, max_iter=5000, dtype=dtype)
    received = (10. * z + scaling.log_scale.double()).softmax(1).mean(0)
    assert ((received - share).abs() / share).max() < 3 * tol and scaling.log_scale.dtype == getattr(torch, dtype)


def test_streamed_is_whole(tmp_path):
    z = sela_workers.rows(300)
    np.save(tmp_path/'rows.npy', z.numpy())
    whole = sinkhorn(z, 10., tol=1e-10, max_iter=5000)
    for rows, chunk in ((z, 7), (z, 37), (np.load(tmp_path/'rows.npy', mmap_mode='r'), 64)):
        part = sinkhorn(rows, 10., tol=1e-10, max_iter=5000, chunk=chunk)
        torch.testing.assert_close(part.log_scale, whole.log_scale, rtol=1e-8, atol=1e-8)
        assert torch.equal(assign_labels(rows, part.log_scale, 10., chunk), assign_labels(z, whole.log_scale, 10.))


def test_memory_is_that_of_a_block():
    "A matrix of 320 MB, made by a head when it is read, adds less than a third of that to the process."
    ran = python('-c', '''
import resource, torch
from selfclass.sela import HeadRows, self_labels
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
z, weight = torch.randn(1, 40_000, 8, generator=g), torch.randn(1000, 8, generator=g)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
self_labels(HeadRows(z[:, :2000], weight), chunk=500, max_iter=0)
before = peak()
labels, _ = self_labels(HeadRows(z, weight), chunk=500, max_iter=1)
print(len(labels), peak() - before < 100)
''', OMP_NUM_THREADS='1')
    assert ran.stdout.split() == ['40000', 'True'], ran.stderr[-2000:]


def test_warm_start_reaches_the_same_fixed_point_sooner():
    z = sela_workers.rows(300)
    moved = (z + .01 * sela_workers.rows(300, seed=1)).log_softmax(1)
    first = sinkhorn(z, 10., tol=1e-10, max_iter=5000)
    cold, warm = (sinkhorn(moved, 10., start=start, tol=1e-10, max_iter=5000) for start in (None, first.log_scale))
    torch.testing.assert_close(warm.log_scale, cold.log_scale, rtol=1e-7, atol=1e-7)
    assert len(warm.errors) < len(cold.errors) and warm.errors[0] < cold.errors[0]


def naively_repaired(scores, labels, sizes):
    "One image after the other goes from a label with too many to the label with too few that costs least."
    labels = labels.copy()
    for i in range(len(labels)):
        counts = np.bincount(labels, minlength=len(sizes))
        if counts[labels[i]] > sizes[labels[i]]:
            under = np.flatnonzero(counts < sizes)
            labels[i] = under[scores[i, under].argmax()]
    return labels


@pytest.mark.parametrize('n, k', [(60, 6), (61, 6), (101, 9), (40, 40), (53, 50)])
def test_rounding_gives_even_sizes_at_the_least_cost(n, k):
    z = sela_workers.rows(n, k, seed=n).numpy()
    start = z.argmax(1)
    sizes = balanced_sizes(np.bincount(start, minlength=k))
    labels = round_balanced(z, start, sizes)
    total = lambda y: z[np.arange(n), y].sum()
    assert np.bincount(labels, minlength=k).tolist() == sizes.tolist() and np.ptp(sizes) <= 1 and sizes.sum() == n
    assert total(labels) >= total(naively_repaired(z, start, sizes)) - 1e-9
    places = np.repeat(np.arange(k), sizes)                            # scipy's assignment of images to places
    image, place = linear_sum_assignment(z[:, places], maximize=True)
    assert total(labels) == pytest.approx(z[image, places[place]].sum(), abs=1e-9)
    scaled, _ = self_labels(torch.from_numpy(z), rounding='balanced')
    assert np.ptp(np.bincount(scaled, minlength=k)) <= 1


def test_loss_equals_its_slow_twin():
    g = torch.Generator().manual_seed(0)
    heads, labels = [[torch.randn(5, c, generator=g) for _ in range(3)] for c in (4, 6)], torch.stack([torch.randint(0, c, (5,), generator=g) for c in (4, 6)])
    slow = [np.mean([-math.log(math.exp(view[i, y[i]] / .3) / sum(math.exp(s / .3) for s in view[i])) for view in views for i in range(5)]) for views, y in zip(heads, labels)]
    assert self_label_loss(heads, labels, .3).item() == pytest.approx(np.mean(slow), rel=1e-5)
    assert self_label_loss(heads, labels, .3, 'sum').item() == pytest.approx(np.sum(slow), rel=1e-5)


@pytest.mark.parametrize('rounding', ['argmax', 'balanced'])
def test_two_processes_label_as_one(rounding):
    labels, scale = sela_workers.share_of_labels(rounding)
    for other, their_scale in launch(sela_workers.share_of_labels, rounding, processes=2):
        assert torch.equal(other, labels)
        torch.testing.assert_close(their_scale, scale, rtol=1e-7, atol=1e-7)


def test_two_processes_train_as_one():
    losses, labels, head_loss, weights, diary = sela_workers.train()
    for theirs, their_labels, their_head_loss, their_weights, their_diary in launch(sela_workers.train, processes=2):
        np.testing.assert_allclose(theirs, losses, rtol=2e-4)
        assert torch.equal(their_labels, labels) and [line['step'] for line in their_diary] == [line['step'] for line in diary]
        np.testing.assert_allclose(their_head_loss, head_loss, rtol=2e-3)
        for name in weights:
            torch.testing.assert_close(their_weights[name], weights[name], rtol=2e-3, atol=2e-4, msg=lambda text: f'{name}: {text}')


PROGRAM = '''
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from selfclass import sela, train
from selfclass.sela import fit_sela
from sela_workers import RECIPE, stripes
class Mortal(train.Checkpoint):
    "A checkpoint after whose second writing the power fails, once."
    def save(self, epoch):
        super().save(epoch)
        if epoch == 3 and os.environ.get("POWER_FAILS"): os._exit(9)
sela.Checkpoint = Mortal
images, (out, state) = stripes(), map(Path, sys.argv[1:])
run = fit_sela(images, **(RECIPE | dict(epochs=7, updates=dict(number=9), held_out=images.subset(range(20)), predict_every=3, checkpoint_every=2,
                                        checkpoints=None if state.name == "none" else state)))
train.save_run(run, out, seed=3)
'''


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    program, here = tmp_path/'train.py', {'PYTHONPATH': f'{sela_workers.__file__.rsplit("/tests/", 1)[0]}:{sela_workers.__file__.rsplit("/", 1)[0]}'}
    program.write_text(PROGRAM)
    whole = python(program, tmp_path/'whole', tmp_path/'none', **here)
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = python(program, tmp_path/'killed', tmp_path/'state', POWER_FAILS='yes', **here)
    assert killed.returncode == 9 and (tmp_path/'state'/'last.pt').exists() and not (tmp_path/'killed').exists()
    resumed = python(program, tmp_path/'resumed', tmp_path/'state', **here)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in ('model.safetensors', 'config.json', 'log.csv', 'predictions.npz', 'labels.csv', 'renewals.csv'):
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'resumed'/name).read_bytes(), name
    assert not (tmp_path/'state').exists(), 'a finished run leaves no checkpoint'


def test_any_network_trains_on_given_labels(tmp_path):
    images, recipe = sela_workers.stripes(), sela_workers.RECIPE
    given = first_labels(50, (3, 5), seed=8)
    file = save_labels(given, tmp_path/'labels.csv')
    run = fit_sela(images, **(recipe | dict(labels=str(file), updates=dict(number=0), epochs=1, model=recipe['model'] | dict(width=8))))
    assert torch.equal(run.labels, given) and run.diary == []
    kept = save_run(run, tmp_path/'run')
    assert (kept/'labels.csv').read_bytes() == file.read_bytes() and (kept/'renewals.csv').read_text() == 'step,head,entropy,changed,n_iter,error\n'


def test_more_labels_than_images_is_named():
    with pytest.raises(ParamsError, match='51 labels cannot be shared out among 50 images; lower classes to at most 50'):
        fit_sela(sela_workers.stripes(), **(sela_workers.RECIPE | dict(model=dict(backbone='convnet', width=4, classes=(3, 51)))))
    with pytest.raises(ParamsError, match='at most 5'):
        sinkhorn(sela_workers.rows(5, 6))


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(bad):
    z = sela_workers.rows()
    z[60, 2] = bad
    with pytest.raises(DataError, match='NaN or infinity in rows 50..74'):
        self_labels(z, chunk=25)
    broken = torch.full((4, 8), math.nan if not math.isnan(bad) else math.inf)
    with pytest.raises(DataError, match='NaN or infinity in rows 0..19'):
        self_labels(HeadRows(torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0)), broken))


def test_labels_of_another_set_are_refused(tmp_path):
    file = save_labels(first_labels(40, (3, 5)), tmp_path/'labels.csv')
    with pytest.raises(DataError, match='each of 50 images'):
        fit_sela(sela_workers.stripes(), **(sela_workers.RECIPE | dict(labels=str(file))))
    with pytest.raises(DataError, match='fewer than one batch'):
        fit_sela(ImageSet('few', sela_workers.stripes().pixels[:9]), **sela_workers.RECIPE)


def test_settings_of_the_original_are_parameters():
    "One view, SGD, rate that drops, sum over heads, first renewal after a start on random labels, one head at a time from equal factors, batch statistics."
    run = fit_sela(sela_workers.stripes(), **(sela_workers.RECIPE | dict(
        views=dict(preset='natural', n_global=1, n_local=0, global_size=16), model=dict(backbone='resnet18', stem='cifar', hidden=None, dim=512, classes=(3, 5)),
        epochs=2, schedule=dict(drops=[1], factor=.1), loss=dict(reduction='sum'), updates=dict(number=3, first=1, in_turn=True, warm_start=False),
        inputs=dict(train_mode=True), sinkhorn=dict(rounding='balanced', prior=[.5, .3, .2]))))
    assert [(line['step'], line['head']) for line in run.diary] == [(1, 0), (6, 1)]
    assert [row['lr'] for row in run.record.rows] == [.05, .005]
    assert run.labels[0].bincount().tolist() == [25, 15, 10] and run.labels[1].bincount().tolist() == [10] * 5
    entropy = -sum(p * math.log(p) for p in (.5, .3, .2))
    assert run.record.collapse == pytest.approx(entropy + math.log(5), rel=1e-6)              # of a sum, with the prior of the head it fits


def test_renewals_that_fall_on_one_step_are_made_once():
    "A thousand renewals in a training of three steps: one before each step and one at its end."
    run = fit_sela(sela_workers.stripes(), **(sela_workers.RECIPE | dict(epochs=1, updates=dict(number=1000))))
    assert [line['step'] for line in run.diary if line['head'] == 0] == [0, 1, 2, 3]
