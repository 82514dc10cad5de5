"""The loss, forward and backward: against the official algorithm, on one device and on several processes."""
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import ROOT, Row, bandwidth, exp_rate, seconds_of
from selfclass.loss import multi_head_loss, uniform_prior_loss

CLASSES, VIEWS, GLOBAL = (1000, 2000, 4000, 8000), 8, 2
PEER = 'official algorithm, targets and predictions once per view and one product for each of 26 pairs; written from the paper'


def cosines(n, classes=CLASSES, views=VIEWS, dtype=torch.float32, device='cpu', seed=0, dim=128):
    "heads[h][v]: logits (n, C), cosines of n unit vectors seen from V views with C unit vectors; seeded, with gradient."
    g = torch.Generator(device).manual_seed(seed)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, dim, generator=g, device=device), dim=-1)
    pictures = unit(n)
    seen = torch.nn.functional.normalize(torch.cat([pictures + .5 * unit(n) for _ in range(views)]), dim=-1)
    heads = [(seen @ unit(c).T).to(dtype).split(n) for c in classes]          # one product a head, as a network makes them
    return [[view.requires_grad_() for view in head] for head in heads]


# ---- the peer --------------------------------------------------------------------------------------------------------

def _shares(x, dim, eps):
    return x / (x.sum(dim, keepdim=True) + eps)


def official_loss(heads, row_temp=.1, col_temp=.05, n_global=GLOBAL, eps=1e-12):
    "Mean over heads and ordered pairs of views, in float32, with eps in both normalisations and in the logarithm."
    total, terms = 0., 0
    for views in heads:
        views = [view.float() for view in views]
        n, c = views[0].shape
        targets = [_shares((view / col_temp).softmax(0), 1, eps) for view in views]
        log_preds = [(n / c * _shares((view / row_temp).softmax(1), 0, eps) + eps).log() for view in views]
        for i, target in enumerate(targets):
            for j, log_pred in enumerate(log_preds):
                if i != j and (i < n_global or j < n_global):
                    total, terms = total - (target * log_pred).sum(1).mean(), terms + 1
    return total / terms


# ---- one device ------------------------------------------------------------------------------------------------------

def step(loss, heads):
    "Value and the gradients of all logits."
    value = loss(heads)
    return value, torch.autograd.grad(value, [view for views in heads for view in views])


def agree(ours, theirs):
    "Same value and gradient, but for the peer's eps and the rounding of gradients in bfloat16."
    rtol = 1e-2 if ours[1][0].dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=0)
    for mine, other in zip(ours[1], theirs[1]):
        off = (mine.float() - other.float()).norm() / other.float().norm()
        assert off <= rtol, f'gradients differ by {off:.1e} of their norm'


def floor(heads, walks=3):
    "Each of three walks reads the logits, the last one writes the gradient."
    device, entries = heads[0][0].device.type, sum(view.numel() for views in heads for view in views)
    size = heads[0][0].element_size()
    seconds = (walks + 1) * entries * size / bandwidth(device)
    exps = 3 * entries / exp_rate(device) if device == 'cpu' else 0.
    says = f'{walks} readings and 1 writing of {entries / 1e6:.0f} M logits of {size} bytes at {bandwidth(device) / 1e9:.0f} GB/s'
    return seconds + exps, says + (f', and 3 exponentials of each at {exp_rate(device) / 1e9:.1f} a nanosecond' if exps else '')


def loss_seconds(n: int, c: int, v: int, repeats: int = 5) -> float:
    "Seconds of one forward and backward pass for n pictures, one head of c classes and v views (two of them global), best of a few."
    views, = cosines(n, (c,), v)
    return min(seconds_of(lambda: step(lambda heads: uniform_prior_loss(heads[0]), [views])) for _ in range(repeats + 1))


# ---- several processes -----------------------------------------------------------------------------------------------

def worker(rank: int, world: int, meet: str, n: int, steps: int = 3) -> dict:
    "One of the processes of a step on n pictures: its CPU seconds and the bytes it hands to collective operations, per step."
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=world)
    sent, reduce = [], dist.all_reduce

    def counted(x, *rest, **named):
        sent.append(x.numel() * x.element_size())
        return reduce(x, *rest, **named)

    dist.all_reduce = counted
    heads = cosines(n // world, seed=rank)
    loss = functools.partial(multi_head_loss, group=dist.group.WORLD if world > 1 else None)
    step(loss, heads)
    sent.clear()
    start = time.process_time()
    for _ in range(steps):
        value, _ = step(loss, heads)
    seconds = (time.process_time() - start) / steps
    dist.barrier()
    dist.destroy_process_group()
    return {'seconds': seconds, 'bytes': sum(sent) / steps, 'loss': value.item()}


def processes(world, n):
    "What each of `world` processes of one thread says about its share of n pictures."
    with tempfile.TemporaryDirectory() as folder:
        more = {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
        runs = [subprocess.Popen([sys.executable, '-m', 'benchmarks.loss', str(rank), str(world), str(Path(folder)/'meet'), str(n)],
                                 stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | more) for rank in range(world)]
        said = [run.communicate(timeout=300)[0] for run in runs]
        assert all(run.returncode == 0 for run in runs), f'a process of {world} failed'
        return [json.loads(words.splitlines()[-1]) for words in said]


def measure_distributed(n=4096) -> dict:
    "CPU seconds per process and bytes on the wire for 1, 2 and 4 processes, one thread each."
    runs = {world: processes(world, n) for world in (1, 2, 4)}
    seconds = {world: max(said['seconds'] for said in run) for world, run in runs.items()}
    gathered = n * VIEWS * sum(CLASSES) * 4
    more = {f'CPU seconds per process, {world} against 1': {'value': seconds[world] / seconds[1], 'goal': goal}
            for world, goal in ((2, .6), (4, .35))}
    for world in (2, 4):
        more[f'bytes of a step against gathering, {world} processes'] = {'value': runs[world][0]['bytes'] / gathered, 'goal': 1 / 500}
    return {'more': more, 'n': 3, 'seconds': {'ours': seconds[2], 'theirs': seconds[1]}, 'bytes': {'ours': runs[2][0]['bytes'], 'theirs': gathered},
            'time_ratio': seconds[2] / seconds[1], 'memory_ratio': None, 'spread': None,
            'note': ', '.join(f'{world} processes: {s:.2f} CPU s each' for world, s in seconds.items())
                    + f"; {runs[2][0]['bytes'] / 1e6:.2f} MB travel a step, gathering the logits {gathered / 1e9:.2f} GB"}


SIZES = '2 + 6 views, heads of 1k, 2k, 4k and 8k classes'
ROWS = [
    Row(row='loss, forward and backward', work=f'512 images, {SIZES}, float32', peer=PEER, prepare=lambda: cosines(512),
        ours=lambda heads: step(multi_head_loss, heads), theirs=lambda heads: step(official_loss, heads),
        agree=agree, floor=floor, goal_time=1/4, goal_memory=1/3, pairs=9),
    Row(row='loss on a GPU', work=f'4096 images, {SIZES}, bfloat16', peer=PEER, prepare=lambda: cosines(4096, dtype=torch.bfloat16, device='cuda'),
        ours=lambda heads: step(multi_head_loss, heads), theirs=lambda heads: step(official_loss, heads),
        agree=agree, floor=floor, goal_time=1/10, goal_memory=1/4, pairs=20, device='cuda'),
    Row(row='loss on 2 and 4 processes', work=f'4096 images, {SIZES}, float32, one thread a process; time ratio: 2 processes against 1',
        peer='one process with the whole batch; gathering all logits', goal_time=.6, measure=measure_distributed),
]

if __name__ == '__main__':
    rank, world, meet, n = sys.argv[1:]
    print(json.dumps(worker(int(rank), int(world), meet, int(n))))
