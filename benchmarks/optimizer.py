"""A step of LARS beside lightly's LARS and torch's SGD, on the parameters of ResNet-50."""
import torch
from torchvision.models import resnet50

from benchmarks.harness import Row, bandwidth
from selfclass.lars import LARS, adapted_gradient

NUMBERS = dict(lr=4.8, momentum=.9, weight_decay=1e-6)         # of the paper
WORK = 'ResNet-50, 25.6 million parameters in 161 tensors, float32, momentum and decay'


def _parameters(device):
    "Parameters of ResNet-50 with gradients, the same at each call."
    torch.manual_seed(0)
    params = [param.detach().to(device) for param in resnet50().parameters()]
    draw = torch.Generator().manual_seed(1)
    for param in params:
        param.grad = (1e-3 * torch.randn(param.shape, generator=draw)).to(device)
    return params


def prepare(peer, device='cpu'):
    "An optimiser for each side; a step changes the parameters, but not the work of the next."
    sides = {'start': _parameters('cpu'), 'device': device}
    for side, make in (('ours', lambda params: LARS(params, **NUMBERS)), ('theirs', peer)):
        params = _parameters(device)
        optimizer = make(params)
        optimizer.step()                                       # makes the momentum, as in all steps but the first
        sides[side] = optimizer, params
    return sides


def _step(side):
    def step(state):
        optimizer, params = state[side]
        optimizer.step()
        return state['start'], params
    return step


def lightly_lars(params):
    from lightly.utils.lars import LARS as Lars                # scales as ours does when there is weight decay
    return Lars(params, **NUMBERS)


def plain_sgd(params):
    return torch.optim.SGD(params, foreach=False, **NUMBERS)


def fused_sgd(params):
    return torch.optim.SGD(params, fused=True, **NUMBERS)


def same_parameters(ours, theirs):
    "Two steps of both have led to the same place, in units of the way gone."
    for start, mine, other in zip(ours[0], ours[1], theirs[1]):
        assert (mine - other).norm() <= 1e-3 * (other - start).norm(), f'parameter of shape {tuple(start.shape)} went elsewhere'


def by_the_rule(ours, theirs):
    "SGD goes elsewhere, so ours is compared with two steps of the rule in float64; theirs has to have moved."
    for start, mine, other in zip(*ours, theirs[1]):
        here, momentum = start.double(), torch.zeros(start.shape, dtype=torch.float64)
        for _ in range(2):
            step = adapted_gradient(here, start.grad.double(), NUMBERS['weight_decay'])
            momentum = NUMBERS['momentum'] * momentum + step
            here = here - NUMBERS['lr'] * momentum
        way = (here - start).norm()
        assert (mine.cpu() - here).norm() <= 1e-3 * way, f'parameter of shape {tuple(start.shape)} went elsewhere'
        assert not torch.equal(other.cpu(), start)


def floor(state):
    "Bytes over bandwidth."
    count = sum(param.numel() for param in state['start'])
    return 28 * count / bandwidth(state['device']), \
        'bytes over bandwidth: 8 per element for the two norms, 20 for the update (reads three tensors, writes two)'


def _row(row, name, peer, agree, device='cpu', **goals):
    return Row(row, WORK, name, lambda: prepare(peer, device), _step('ours'), _step('theirs'), agree, floor, device=device, **goals)


ROWS = [
    _row('LARS step beside another LARS', 'lightly.utils.lars.LARS', lightly_lars, same_parameters, goal_time=.6, pairs=15, requires='lightly'),
    _row('LARS step beside SGD', 'torch.optim.SGD(foreach=False)', plain_sgd, by_the_rule, goal_time=1.3, pairs=15),
    _row('LARS step on a GPU', 'torch.optim.SGD(fused=True)', fused_sgd, by_the_rule, device='cuda', goal_time=1.3, pairs=51),
]
