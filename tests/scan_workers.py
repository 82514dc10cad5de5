"""Functions that tests of SCAN start in several processes: a new process must be able to import them."""
import torch
import torch.nn.functional as F

from selfclass.data import ImageSet
from selfclass.dist import rank, world_size
from selfclass.model import ClusterNet
from selfclass.scan import MemoryBank, confident_labels, confident_loss, fit_scan, instance_loss, look_at, mine_neighbours, rotation_loss, scan_loss, simclr_loss
from toy_pictures import stripes

SGD = dict(name='sgd', lr=.03, momentum=.9)           # its steps do not turn rounding into signs, as Adam's do where a gradient is nearly zero
GLYPHS = dict(preset='glyphs', n_global=2, n_local=0, global_size=8, rotation=5., shift=.05)
RECIPE = dict(model=dict(backbone='convnet', width=4, hidden=None, classes=(3, 3, 5)), views=GLYPHS, loss=dict(row_temp=.05),
              pretext=dict(task='simclr', hidden=16, dim=8, epochs=3, optimizer=SGD, schedule=dict(warmup_epochs=1)), neighbours=dict(k=4, features='backbone'),
              clustering=dict(epochs=4, optimizer=SGD), selflabel=dict(epochs=3, optimizer=SGD, threshold=.5, views=GLYPHS | dict(rotation=20.)),
              batch_size=16, device='cpu', seed=3)
PRETEXTS = {'simclr': RECIPE['pretext'], 'nce': dict(task='nce', dim=8, negatives=20, epochs=3, optimizer=SGD), 'rotation': dict(task='rotation', epochs=3, optimizer=SGD)}


def losses():
    "Every loss of a batch of twelve, and its gradient, from this process's share; the gradient of a whole row is that of its process times the processes."
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 5, generator=g) for _ in range(2))
    others, labels = F.normalize(torch.randn(12, 7, 5, generator=g), dim=2), confident_labels(a, .6, .5)
    mine, found = slice(rank(), None, world_size()), {}
    turned = torch.randn(4, 12, 4, generator=g)
    unit = lambda x: F.normalize(x, dim=1)
    for name, loss in {'simclr': lambda x: simclr_loss([unit(x), unit(b[mine])], .3), 'scan': lambda x: scan_loss(x, b[mine], 3., .5),
                       'prior': lambda x: scan_loss(x, b[mine], 3., .5, [.1, .2, .3, .2, .2]),
                       'nce': lambda x: instance_loss(unit(x), unit(b[mine]), others[mine], 2., 50, .5),
                       'rotation': lambda x: rotation_loss(torch.cat([t[mine] for t in turned]) * x.mean(1).repeat(4)[:, None]),
                       'confident': lambda x: confident_loss(x, labels[mine], .5), 'even': lambda x: confident_loss(x, labels[mine], .5, False)}.items():
        x = a[mine].clone().requires_grad_()
        value = loss(x)
        value.backward()
        found[name] = value.item(), x.grad / world_size()
    return found


def bank_and_neighbours():
    "A memory bank after two batches, and neighbours of random points."
    torch.manual_seed(0)
    g, bank = torch.Generator().manual_seed(1), MemoryBank(30, 4)
    for step in range(2):
        z, index = F.normalize(torch.randn(8, 4, generator=g), dim=1)[rank()::world_size()], torch.randperm(30, generator=g)[:8][rank()::world_size()]
        others = bank.draw(len(z), 6)
        if step == 0:
            bank.estimate(z, others, .5)
        bank.push(z, index)
    return bank.z, bank.log_partition, others, mine_neighbours(torch.randn(51, 6, generator=g), 4)


def looked_at():
    "What two processes say of 51 images, together: mean brightness and a number of each."
    images = stripes().pixels[:, :, :, :]
    images = ImageSet('odd', torch.cat([images, images[:1] // 2]))
    net = ClusterNet('convnet', width=4, hidden=None, classes=(3,))
    return look_at(net, images, lambda x: x.float(), lambda x: torch.stack([x.mean((1, 2, 3)), x[:, 0, 3, 3]], 1)), images.pixels.float().mean((1, 2, 3))


def summary(run):
    "What a run leaves, as plain things that can be sent."
    return dict(rows=run.record.rows, head_loss=run.head_loss, heads=run.heads, weights=run.net.state_dict(), neighbours=run.neighbours, pretext=run.pretext,
                confident=run.confident, before=run.before, ids=run.record.ids, uncertain=run.uncertain)


def train(task='simclr'):
    "A short training: of all phases behind SimCLR, without self-labelling behind the others."
    few = dict(clustering=dict(epochs=2, optimizer=SGD), selflabel=RECIPE['selflabel'] | dict(epochs=2)) if task == 'simclr' else dict(clustering=dict(epochs=1, optimizer=SGD), selflabel=None)
    images, recipe = stripes(), RECIPE | few
    recipe = recipe | dict(neighbours=dict(k=0))           # which of two near neighbours is nearer is a matter of rounding; that one table is mined by all is tested apart
    return summary(fit_scan(images, **(recipe | dict(pretext=PRETEXTS[task])), held_out=images.subset(range(21))))
