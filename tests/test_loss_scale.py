"""The loss at any scale: fused and plain, one process and several, give the same value and the same gradient."""
import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close

from selfclass.loss import fused_loss, log_predictions, log_targets, multi_head_loss, pair_cross_entropy, plain_loss, uniform_prior_loss


def slow_loss(views, row_temp=.1, col_temp=.05, n_global=2, prior=None):
    "One pair of views after the other, in plain probabilities."
    N, C = views[0].shape
    w = views[0].new_full((C,), 1 / C) if prior is None else torch.as_tensor(prior).to(views[0])
    terms = []
    for i, j in itertools.permutations(range(len(views)), 2):
        if i < n_global or j < n_global:
            R, K = (views[j] / row_temp).softmax(1), w * (views[i] / col_temp).softmax(0)
            terms.append(-(K / K.sum(1, keepdim=True) * (N * w * R / R.sum(0)).log()).sum() / N)
    return sum(terms) / len(terms)


def cosines(V, N, C, dtype=torch.float64, scale=1.):
    torch.manual_seed(V + N + C)
    return [view.requires_grad_() for view in (scale * (2 * torch.rand(V, N, C, dtype=torch.float64) - 1)).to(dtype)]


def assert_same(losses, views, rtol, **settings):
    "Values and gradients of several losses agree, relative to the largest entry (or to 1/N, the share of a picture, where all are 0)."
    values = [loss(views, **settings) for loss in losses]
    grads = [torch.cat(torch.autograd.grad(value, views)).double() for value in values]
    for value, grad in zip(values[1:], grads[1:]):
        assert_close(value.double(), values[0].double(), rtol=rtol, atol=rtol)
        assert_close(grad, grads[0], rtol=rtol, atol=rtol * max(grads[0].abs().max().item(), 1 / len(views[0])))


@pytest.mark.parametrize('V, G', [(2, 1), (2, 2), (3, 3), (8, 2)])
@pytest.mark.parametrize('N, C', [(9, 4), (4, 9), (3, 1), (40, 130)])
def test_fused_plain_and_slow_twin_agree(V, G, N, C):
    prior = torch.rand(C, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + .1
    for w, temps in itertools.product((None, prior / prior.sum()), ((.1, .05), (.2, .07))):
        settings = dict(row_temp=temps[0], col_temp=temps[1], n_global=G, prior=w)
        assert_same((slow_loss, plain_loss, fused_loss), cosines(V, N, C), 1e-10, **settings)
        assert_same((plain_loss, fused_loss), cosines(V, N, C, torch.float32), 1e-5 if C > 1 else 1e-4, **settings)     # one class: all is 0


@pytest.mark.parametrize('C', [300, 5000])
def test_several_blocks_of_rows(C):
    assert_same((plain_loss, fused_loss), cosines(3, 300, C, torch.float32), 1e-5)


def test_a_class_that_nobody_takes_and_one_that_all_take():
    views = cosines(4, 60, 20)
    with torch.no_grad():
        for view in views:
            view[:, 0], view[:, 1] = -1., 1.
    assert_same((slow_loss, plain_loss, fused_loss), views, 1e-10)
    assert_same((plain_loss, fused_loss), [view.detach().float().requires_grad_() for view in views], 1e-5)


@pytest.mark.parametrize('scale', [0., 1., 3., 5., 1e2, 1e4])
def test_extreme_logits(scale):
    views = cosines(4, 16, 30, torch.float32, scale)
    assert_same((plain_loss, fused_loss), views, 1e-4)
    loss = fused_loss(views)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in torch.autograd.grad(loss, views))
    views = [torch.randint(-1, 2, view.shape).to(view).mul(scale).requires_grad_() for view in views]
    assert_same((plain_loss, fused_loss), views, 1e-4)


def test_not_a_number_stays_one():
    views = cosines(2, 5, 4)
    with torch.no_grad():
        views[0][2, 1] = float('nan')
    assert fused_loss(views).isnan() and plain_loss(views).isnan()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    views = cosines(8, 20, 30, dtype)
    fused, plain = (torch.autograd.grad(loss(views), views) for loss in (fused_loss, plain_loss))
    assert fused_loss(views).dtype == torch.float32 and {grad.dtype for grad in fused} == {dtype}
    assert_close(fused_loss(views), plain_loss(views), rtol=1e-6, atol=0)
    assert_close(fused, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_rough_matrix_products_and_autocast_do_not_reach_the_loss():
    views = cosines(8, 20, 300, torch.float32)
    value, grads = fused_loss(views), torch.autograd.grad(fused_loss(views), views)
    try:
        torch.set_float32_matmul_precision('medium')
        with torch.autocast('cpu', torch.bfloat16):
            again = fused_loss(views)
            assert_close(torch.autograd.grad(again, views), grads, rtol=0, atol=0)
        assert_close(again, value, rtol=0, atol=0)
    finally:
        torch.set_float32_matmul_precision('highest')


def test_views_may_be_slices_of_one_product():
    product = (2 * torch.rand(24, 70, generator=torch.Generator().manual_seed(0)) - 1).requires_grad_()
    heads = [list(part.split(6)) for part in product.split((40, 30), 1)]
    grads = [torch.autograd.grad(sum(map(loss, heads)), product)[0] for loss in (fused_loss, plain_loss)]
    assert_close(*grads, rtol=1e-5, atol=1e-5 * grads[1].abs().max().item())


def test_backward_twice_partly_and_not_at_all():
    views = cosines(4, 6, 5)
    views[1].requires_grad_(False), views[3].requires_grad_(False)
    wanted = [view for view in views if view.requires_grad]
    loss = fused_loss(views)
    first = torch.autograd.grad(3 * loss, wanted, retain_graph=True)
    assert_close(torch.autograd.grad(loss, wanted), tuple(grad / 3 for grad in first))
    assert_close(first, torch.autograd.grad(3 * plain_loss(views), wanted), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert_close(fused_loss(views), loss.detach(), rtol=0, atol=0)
        assert not fused_loss(views).requires_grad
    assert torch.autograd.gradcheck(lambda *v: fused_loss([*v, views[1]], .2, .1, 1), wanted)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(torch.autograd.grad(fused_loss(wanted), wanted, create_graph=True)[0].sum(), wanted)


def test_a_changed_view_is_noticed():
    views = [view * 1 for view in cosines(2, 6, 5)]
    loss = fused_loss(views)
    views[0].mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_small_heads_take_the_plain_way_to_the_bit():
    heads = [cosines(6, 256, 10, torch.float32) for _ in range(26)]
    logits = torch.stack([torch.stack(head) for head in heads], 1)
    by_hand = pair_cross_entropy(log_targets(logits).exp(), log_predictions(logits)) / 26
    assert_close(multi_head_loss(heads), by_hand, rtol=0, atol=0)
    assert_close(uniform_prior_loss(heads[0]), plain_loss(heads[0]), rtol=0, atol=0)


def test_large_heads_take_the_fused_way():
    small, large = cosines(8, 12, 10, torch.float32), cosines(8, 12, 400, torch.float32)
    assert 'WithGradient' in str(uniform_prior_loss(large).grad_fn) and 'WithGradient' not in str(uniform_prior_loss(small).grad_fn)
    prior = torch.arange(1., 401) / torch.arange(1., 401).sum()
    both = multi_head_loss([small, large, large], prior=[None, prior, None])
    assert_close(both, (plain_loss(small) + plain_loss(large, prior=prior) + plain_loss(large)) / 3, rtol=1e-6, atol=0)


PROGRAM = '''
import itertools, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from selfclass.loss import fused_loss, multi_head_loss, plain_loss
rank, world, meet = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=world)
wire = []
reduce = dist.all_reduce
def counted(x, *rest, **named): wire.append(x.numel() * x.element_size()); return reduce(x, *rest, **named)
dist.all_reduce = counted
group = dist.group.WORLD

def share(N, equal):
    "Rows of this process; unequal parts unless asked for."
    sizes = [N // world] * world if equal else [N // world + (1 if r % 2 else -1) for r in range(world)]
    sizes[-1] = N - sum(sizes[:-1])
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])

def grads(loss, views): return [grad.double() for grad in torch.autograd.grad(loss, views)]

for (V, G), kind, loss, equal in itertools.product(((2, 2), (8, 2)), (torch.float64, torch.float32), (plain_loss, fused_loss), (True, False)):
    rtol = 1e-10 if kind == torch.float64 else 1e-5
    g = torch.Generator().manual_seed(V)
    heads = [[view.to(kind) for view in 2 * torch.rand(V, 24, C, generator=g, dtype=torch.float64) - 1] for C in (7, 40)]
    for view in heads[0]: view[:, 0], view[:, 1] = 1., -1.                     # classes are used unevenly
    prior = torch.arange(1, 8, dtype=torch.float64) / 28
    for head, w in ((heads[0], prior), (heads[0], None), (heads[1], None)):
        whole = [view.clone().requires_grad_() for view in head]
        mine = [view[share(24, equal)].clone().requires_grad_() for view in head]
        alone, together = plain_loss(whole, n_global=G, prior=w), loss(mine, n_global=G, prior=w, group=group)
        assert_close(together, alone, rtol=rtol, atol=0)
        for wanted, found in zip(grads(alone, whole), grads(together, mine)):
            assert_close(found / world, wanted[share(24, equal)], rtol=rtol, atol=rtol * wanted.abs().max().item())

# wide logits on one process only: all fall back together
wide = [view * (1e4 if rank == world - 1 else 1) for view in torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(rank))]
assert_close(fused_loss(wide, group=group), plain_loss(wide, group=group), rtol=0, atol=0)

# what travels does not depend on the number of pictures, and is little
classes, travelled = (1000, 2000, 4000, 8000), []
for N in (2, 4) if world == 2 else ():
    heads = [[view.requires_grad_() for view in torch.rand(8, N, C)] for C in classes]
    wire.clear()
    multi_head_loss(heads, group=group).backward()
    travelled.append(sum(wire))
if travelled:
    assert travelled[0] == travelled[1] <= 4096 * 8 * sum(classes) * 4 / 500, travelled

# five steps of DistributedDataParallel end where one process ends
def five_steps(wrap, rows, group, heads_of):
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 30 + 400).double()
    model, g = wrap(net), torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(net.parameters(), lr=1., momentum=.9)
    for _ in range(5):
        x = torch.randn(8, 24, 6, generator=g, dtype=torch.float64)[:, rows]
        logits = torch.tanh(model(x.flatten(0, 1))).unflatten(0, (8, -1))
        optimizer.zero_grad()
        multi_head_loss([list(head) for head in logits.split((30, 400), -1)], group=group).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]
alone = five_steps(lambda net: net, slice(None), None, None)
together = five_steps(DistributedDataParallel, share(24, False), group, None)
assert_close(together, alone, rtol=1e-10, atol=1e-10)
dist.destroy_process_group()
print("equal")
'''


@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_many_processes_equal_one(world, tmp_path):
    program = tmp_path/'many.py'
    program.write_text(PROGRAM)
    runs = [subprocess.Popen([sys.executable, program, str(rank), str(world), tmp_path/'meet'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}) for rank in range(world)]
    said = [run.communicate(timeout=180) for run in runs]
    assert [out.strip() for out, _ in said] == ['equal'] * world, max((err for _, err in said), key=len)[-2000:]
