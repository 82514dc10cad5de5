"""Functions that tests of SCLRE start in several processes: a new process must be able to import them."""
import torch
import torch.nn.functional as F

from selfclass.data import ImageSet
from selfclass.dist import gather_instances, rank, world_size
from selfclass.sclre import CrossInstanceAttention, fit_crossentropy, fit_sclre, sclre_loss, target_anchors

RECIPE = dict(model=dict(backbone='convnet', width=4, hidden=16, dim=8), views=dict(preset='glyphs', n_global=2, n_local=0, global_size=8),
              optimizer=dict(name='sgd', lr=.05, momentum=.9), schedule=dict(warmup_epochs=1.), epochs=3, batch_size=16, device='cpu', seed=3)
METHODS = {'sclre': (fit_sclre, dict(attention=dict(heads=4, key_dim=8, reference=15))), 'crossentropy': (fit_crossentropy, {})}


def stripes(n=50):
    "Pictures of 8 x 8 pixels with stripes of four directions and some noise; two directions are a superclass."
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(8.), torch.arange(8.), indexing='ij')
    kind = torch.arange(n) % 4
    waves = torch.stack([torch.sin(1.5 * x), torch.sin(1.1 * (x + y)), torch.sin(1.5 * y), torch.sin(1.1 * (x - y))])[kind]
    ink = (127 + 90 * waves + 20 * torch.randn(n, 8, 8, generator=g)).clamp(0, 255).to(torch.uint8)
    return ImageSet('stripes', ink[:, None].expand(-1, 3, -1, -1).contiguous(), labels=(kind // 2).numpy(), class_names=('early', 'late'))


def loss_and_gradients():
    "Attention and loss of one batch of 12 images, of which this process has its share; gradients averaged over processes."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 8, generator=g, dtype=torch.float64), torch.randint(0, 3, (12,), generator=g)
    torch.manual_seed(1)
    look, head, anchors = CrossInstanceAttention(8, 2, 4, 5).double(), torch.nn.Linear(8, 3).double(), target_anchors(3, 8).double()
    mine = x[rank()::world_size()].clone().requires_grad_()
    v = F.normalize(look(mine), dim=1)
    loss = sclre_loss(gather_instances(v), gather_instances(head(v)), anchors, y)
    loss.backward()
    weights = [p.grad for p in (*look.parameters(), *head.parameters())]
    whole = torch.zeros_like(x)
    whole[rank()::world_size()] = mine.grad
    return loss.item(), weights, whole


def train(method):
    "What a short training leaves."
    fit, more = METHODS[method]
    run = fit(stripes(), held_out=stripes(21), **(RECIPE | more))
    return [row['loss'] for row in run.record.rows], run.head_loss, run.net.state_dict(), run.superclasses
