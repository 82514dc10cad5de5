"""Two processes compute what one computes: the loss of the global batch and its gradients."""
import os
import subprocess
import sys

from conftest import ROOT, python

PROGRAM = '''
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from selfclass.loss import multi_head_loss
from selfclass.model import ClusterNet
rank, meet = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)
net = ClusterNet("convnet", width=4, hidden=8, dim=6, classes=(5, 7), batch_norm=False).double().eval()
g = torch.Generator().manual_seed(1)
views = [torch.randn(8, 3, 8, 8, generator=g, dtype=torch.float64) for _ in range(3)]
prior = [torch.tensor([.4, .3, .1, .1, .1], dtype=torch.float64), None]
alone = multi_head_loss(net.classify(net.embed(views)), prior=prior)
alone.backward()
wanted = [p.grad.clone() for p in net.parameters()]
net.zero_grad()
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
class Whole(torch.nn.Module):
    def __init__(self): super().__init__(); self.net = net
    def forward(self, views): return self.net.classify(self.net.embed(views))
wrapped = DistributedDataParallel(Whole())
mine = [view[4 * rank: 4 * rank + 4] for view in views]
loss = multi_head_loss(wrapped(mine), prior=prior, group=dist.group.WORLD)
loss.backward()
torch.testing.assert_close(loss, alone, rtol=1e-10, atol=1e-10)
for p, grad in zip(net.parameters(), wanted): torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-10)
dist.destroy_process_group()
print("equal")
'''


FETCH = '''
import os, sys, time, torch.distributed as dist
from pathlib import Path
from selfclass.dist import first_on_machine
rank, meet = int(sys.argv[1]), sys.argv[2]
os.environ["LOCAL_RANK"] = str(rank)
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
archive = Path(meet).with_name("archive")
with first_on_machine():
    if archive.exists():
        print("found", archive.read_text())
    else:
        time.sleep(1)
        archive.write_text("whole")
        print("fetched")
dist.destroy_process_group()
'''


def twice(tmp_path, text):
    "What a program prints in each of two processes, given its rank and a file to meet at."
    program = tmp_path/'twice.py'
    program.write_text(text)
    runs = [subprocess.Popen([sys.executable, program, str(rank), tmp_path/'meet'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | {'PYTHONPATH': str(ROOT)}) for rank in range(2)]
    said = [run.communicate(timeout=180) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said[0][1][-2000:]
    return [out.strip() for out, _ in said]


def test_global_loss_and_gradients_equal_one_process(tmp_path):
    assert twice(tmp_path, PROGRAM) == ['equal', 'equal']


def test_the_first_process_of_a_machine_fetches_and_the_others_find(tmp_path):
    assert twice(tmp_path, FETCH) == ['fetched', 'found whole']


def test_one_process_needs_no_flag():
    ran = python('-c', 'from selfclass.dist import rank, world_size; print(rank(), world_size())')
    assert ran.stdout.split() == ['0', '1'], ran.stderr
