"""The Triton kernels of the loss compute the right numbers, in Triton's interpreter where there is no GPU."""
from importlib.util import find_spec

import pytest
from conftest import python

PROGRAM = '''
import warnings, torch
warnings.simplefilter("ignore", RuntimeWarning)          # the interpreter computes masked-out entries too
from torch.testing import assert_close
from selfclass import kernels, loss as blocks
from selfclass.loss import _on_kernels, fused_loss, plain_loss
def case(V, N, C, kind, scale):
    torch.manual_seed(V + N + C)
    product = (scale * (2 * torch.rand(V * N, C + 3) - 1)).to(kind)
    return [view.requires_grad_() for view in product[:, 3:].split(N)]
for V, G, N, C in ((2, 1, 3, 40), (3, 3, 2, 1), (4, 2, 70, 5), (8, 2, 3, 20)):
    prior = torch.rand(C, dtype=torch.float64) + .1
    for kind, scale, rtol in ((torch.float32, 1., 1e-5), (torch.bfloat16, 1., 1e-2), (torch.float32, 1e4, 2e-2)):
        for settings in (dict(), dict(row_temp=.2, col_temp=.07, prior=prior / prior.sum())):
            views = case(V, N, C, kind, scale)
            assert _on_kernels(views[0])
            fused, plain = (loss(views, n_global=G, **settings) for loss in (fused_loss, plain_loss))
            assert_close(fused, plain, rtol=min(rtol, 1e-3), atol=1e-5)
            grads = [torch.cat(torch.autograd.grad(2 * loss, views)) for loss in (fused, plain)]
            assert grads[0].dtype == kind and grads[0].isfinite().all()
            a, b = grads[0].float(), grads[1].float()
            assert (a - b).norm() <= rtol * b.norm() + 1e-5, (V, G, N, C, kind, scale, settings, (a - b).norm() / b.norm())
x = torch.stack(case(4, 9, 12, torch.float32, 1.)).detach()
assert_close(kernels.column_logs(x, .1, .05), blocks._column_logs(x, .1, .05), rtol=1e-5, atol=1e-5)
a, b = torch.rand(2, 4, 12)
w = torch.rand(12)
assert_close(kernels.target_sums(x, a, b, w, .1, .05, 2), blocks._target_sums(x, a, b, w, .1, .05, 2), rtol=1e-5, atol=1e-4)
print("equal")
'''


@pytest.mark.skipif(find_spec('triton') is None, reason='this build of PyTorch comes without Triton')
def test_kernels_agree_with_the_plain_loss():
    ran = python('-c', PROGRAM, TRITON_INTERPRET='1')
    assert ran.stdout.strip() == 'equal', ran.stderr[-3000:]


def test_without_triton_the_module_imports_and_the_plain_loss_is_used():
    code = ('import sys; sys.modules["triton"] = None\n'
            'import torch, selfclass.kernels, selfclass.loss as loss\n'
            'views = list(torch.rand(2, 4, 600))\n'
            'print(selfclass.kernels.jit(len) is len, loss._on_kernels(views[0]), loss.uniform_prior_loss(views).item() > 0)')
    ran = python('-c', code)
    assert ran.stdout.split() == ['True', 'False', 'True'], ran.stderr[-2000:]
