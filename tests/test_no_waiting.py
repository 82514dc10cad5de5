"""A step that never waits: on a GPU, Python runs ahead of the device unless an operation asks it for a number. Network, loss, gradients and optimiser do not."""
import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from selfclass.core import read_yaml, seed_everything
from selfclass.data import ImageSet
from selfclass.lars import _move_together
from selfclass.selfclassifier import NeighbourQueue, make_step
from selfclass.train import start_training

ASKING = {'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::is_nonzero', 'aten::equal', 'aten::item', 'aten::_unique2', 'aten::unique_dim', 'aten::unique_consecutive',
          'aten::repeat_interleave', 'aten::bincount', 'aten::multinomial'}


class Listening(TorchDispatchMode):
    "Notes every operation whose result, or its size, the host has to wait for."

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().split('.')[0]
        masks = name in ('aten::index', 'aten::index_put', 'aten::index_put_') and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        if name in ASKING or masks:
            self.waits.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize('ask', [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).all()), lambda x: x.nonzero()])
def test_listening_hears_what_waits(ask):
    with Listening() as listening:
        ask(torch.randn(5))
    assert listening.waits


@pytest.mark.parametrize('name', ['cifar10-h200', 'imagenet-100ep'])
def test_network_loss_gradients_and_optimiser_ask_the_device_nothing(name):
    """A step of the recipe with a small network, the filling of the queue, and the form of LARS that accelerators take.

    Views and LARS have a form of their own for CPUs, which does wait; the search for neighbours checks its rows, and waits everywhere.
    """
    params = read_yaml(ROOT/'conf'/f'{name}.yaml')
    recipe = params['methods']['selfclassifier']
    seed_everything(0)
    images = ImageSet('noise', torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8))
    small = {'backbone': 'resnet18', 'stem': 'cifar', 'hidden': 32, 'batch_norm': True, 'dim': 16, 'classes': (4, 4, 7)}
    net, loader, optimizer = start_training(images, 0, small, recipe['views'] | {'global_size': 16, 'local_size': 8}, recipe['optimizer'], 8, 'cpu')
    queue, (group,) = NeighbourQueue(16, net.dim), optimizer.param_groups
    step = make_step(net.train(), None, n_global=loader.views.n_global, **recipe['loss'])
    batch, other = loader[0], loader[1]
    before = [param.clone() for param in group['params']]
    move = lambda: _move_together(group['params'], [optimizer.state[param] for param in group['params']], group)
    step(batch).backward()
    with torch.no_grad():
        move()                             # makes the momentum
    with Listening() as listening:
        optimizer.zero_grad(set_to_none=True)
        step(other).backward()
        with torch.no_grad():
            move()
        queue.push(torch.randn(8, 16), other[0])
    assert not listening.waits, sorted(set(listening.waits))
    assert queue.pushed == 8 and sum(not torch.equal(a, b) for a, b in zip(before, group['params'])) > .9 * len(before), 'and it was a step'
