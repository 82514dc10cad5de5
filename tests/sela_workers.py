"""Functions that tests of SeLa start in several processes: a new process must be able to import them."""
import torch

from selfclass.dist import rank, world_size
from selfclass.sela import fit_sela, self_labels
from toy_pictures import stripes

RECIPE = dict(model=dict(backbone='convnet', width=4, hidden=None, classes=(3, 5)), views=dict(preset='glyphs', n_global=2, n_local=0, global_size=8),
              optimizer=dict(name='sgd', lr=.05, momentum=.9), schedule=dict(drops=[2]), updates=dict(number=6), epochs=3, batch_size=16, device='cpu', seed=3)


def rows(n=101, k=6, seed=0):
    "Log-probabilities (n, k), some labels likelier than others."
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=g, dtype=torch.float64) + torch.randn(k, generator=g, dtype=torch.float64)).log_softmax(1)


def share_of_labels(rounding):
    "Labels and factors from this process's rows, an uneven share: process 0 has every third row too few."
    z = rows()
    mine = torch.arange(len(z)) % 3 != 0 if rank() == 0 and world_size() > 1 else torch.arange(len(z)) % 3 == 0 if world_size() > 1 else torch.ones(len(z), dtype=bool)
    index = mine.nonzero()[:, 0].flip(0)
    labels, scaling = self_labels(z[index], index, lam=10., tol=1e-9, max_iter=5000, rounding=rounding, chunk=7)
    return labels, scaling.log_scale


def train():
    "What a short training leaves."
    run = fit_sela(stripes(), **RECIPE)
    return [row['loss'] for row in run.record.rows], run.labels, run.head_loss, run.net.state_dict(), run.diary
