"""Functions that tests start in several processes: a new process must be able to import them."""
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from selfclass import selfclassifier
from selfclass.augment import MultiCrop
from selfclass.data import ImageSet
from selfclass.dist import all_gather_batch, rank, share_batch_norm, sum_over_ranks, whole_group, world_size
from selfclass.errors import SelfclassError
from selfclass.train import Checkpoint, train_and_save

EPOCHS, DIES_AFTER = 12, 6
# without an MLP: the gradient of a bias before batch norm is rounding alone, and AdamW would make steps of it
RECIPE = dict(model=dict(backbone='convnet', width=8, hidden=None, dim=32, classes=(5, 10)), schedule=dict(warmup_epochs=2.), epochs=EPOCHS, queue=40,
              views=dict(preset='glyphs', n_local=1, global_size=8, local_size=8))
PRETRAIN = dict(batch_size=32, device='cpu', predict_every=5, checkpoint_every=2)


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


class Mortal(Checkpoint):
    "A checkpoint at whose writing in the middle of the run the power of one process fails."
    how = None

    def save(self, epoch):
        super().save(epoch)
        if epoch == DIES_AFTER and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL) if self.how == 'signal' else os._exit(9)


def train_noise(out, state, dies=None):
    "A small training with queue, batch norm and two heads; `dies`: by 'signal' or by 'exit', after its third checkpoint."
    torch.set_num_threads(1)
    Mortal.how, selfclassifier.Checkpoint = dies, Mortal if dies else Checkpoint
    noise = torch.randint(0, 256, (256, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, recipe = ImageSet('noise', noise), RECIPE | {'optimizer': dict(name='adamw', lr=.01)}
    return train_and_save(images, images.subset(range(50)), Path(out), 'noise', 'selfclassifier', 3, PRETRAIN, recipe, state and Path(state))['speed']


def train_apart(out, states):
    "The same, once for each of `states`, where each process has a folder of its own; what each of them said."
    said = []
    for state in states:
        try:
            said.append(train_noise(out, f'{state}-{rank()}'))
        except SelfclassError as error:
            said.append((type(error).__name__, str(error)))
    return said


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


def transfer_protocols(folder, train, test, section):
    "Scores of all protocols, which held-out images this process saw, and logits of what was trained, on held-out images."
    from selfclass import transfer
    kept, scored, score = [], [], transfer.score_images

    def watched(logits_of, names, images, view, *rest, **more):
        kept.append(logits_of(view(images.batch(range(40)))).detach())
        return score(logits_of, names, images, view, *rest, **more)
    transfer.score_images = watched
    try:
        scores = transfer.run_probes(folder, train, test, section)
    finally:
        transfer.score_images = score
    for index, _ in transfer._viewed(test, lambda batch: batch, 10, torch.device('cpu'), 0):
        scored += index.tolist()
    return {'scores': scores, 'logits': kept, 'scored': scored}


class Late(MultiCrop):
    "Views that every worker but the first takes seconds to receive, as on a busy machine."
    folder = None

    def __reduce__(self):
        return received_late, (self.config, str(self.folder))


def received_late(config, folder):
    try:
        (Path(folder)/'first').touch(exist_ok=False)
    except FileExistsError:
        time.sleep(3)
    return MultiCrop(**config)
