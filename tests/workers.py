"""Functions that tests start in several processes: a new process must be able to import them."""
import os
import signal
import time

import torch
from torch import nn

from selfclass.dist import all_gather_batch, rank, share_batch_norm, sum_over_ranks, whole_group, world_size


def say(text):
    print(text, rank(), flush=True)
    return os.getpid()


def rank_and_threads():
    return rank(), world_size(), torch.get_num_threads()


def fail_on_last(text):
    if rank() == world_size() - 1:
        from selfclass.errors import DataError
        raise DataError(text)
    time.sleep(60)


def kill_first():
    if not rank():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def dealt(n):
    "Rows of a batch of n, dealt out, gathered."
    mine = torch.arange(n, dtype=torch.float64)[rank()::world_size(), None]
    return all_gather_batch(mine)[:, 0].tolist()


def batch_norm(size):
    "Outputs, gradients and running statistics of batch norm on this process's share of 12 images; `size` processes share."
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(12, 3, 5, 5, generator=g, dtype=torch.float64) for _ in range(2))
    net = share_batch_norm(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(75)).double(), size)
    mine = x[rank()::world_size()].clone().requires_grad_()
    y = net(mine)
    sum_over_ranks((y * w[rank()::world_size()].flatten(1)).sum(), whole_group()).backward()
    deal = [all_gather_batch(t) for t in (y, mine.grad / world_size())]
    return [*deal, *net.state_dict().values()]
