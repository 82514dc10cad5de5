"""Search, PCA and k-means at sizes where the fast ways are taken: exact, bounded in memory, equal for any number of processes."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, python
from torch.nn.functional import normalize

import selfclass.search as search
from selfclass.search import fit_kmeans, fit_pca, top_k

TYPES = {'bfloat16': (torch.bfloat16,), 'bfloat16, then float32': (torch.bfloat16, torch.float32), 'float32': (torch.float32,), 'none': ()}


def exact(queries, keys, k, exclude=None):
    "Scores in float64, rounded to float32, sorted stably."
    scores = (queries.double() @ keys.double().T).float()
    if exclude is not None:
        row = (exclude >= 0).nonzero().squeeze(1)
        scores[row, exclude[row]] = -torch.inf
    best = scores.sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], best.indices[:, :k]


def same(found, wanted, queries, keys, tol=3e-7):
    "The same keys, but where float32 cannot tell scores apart."
    value, index = found
    scale = queries.double().norm(dim=1) * keys.double().norm(dim=1).max()
    off = (value.double() - wanted[0].double()).abs() / scale.clamp(min=1e-300)[:, None]
    assert off.max() <= tol, off.max()
    true = (queries.double()[:, None] * keys.double()[index]).sum(2)
    assert ((true - wanted[0].double()).abs() / scale.clamp(min=1e-300)[:, None]).max() <= tol
    assert all(len(set(row)) == len(row) for row in index.tolist())


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(params=TYPES)
def types(request, monkeypatch):
    "Screen in these types, whatever the machine has."
    monkeypatch.setattr(search, '_screen_types', lambda device: TYPES[request.param])
    return TYPES[request.param]


@pytest.fixture(autouse=True)
def low_threshold(monkeypatch):
    "Let screening begin at sizes that brute force can check."
    monkeypatch.setattr(search, '_repays', lambda n_queries, n_keys, k, dtype: dtype is torch.float32 and n_keys >= 2000)


@pytest.mark.parametrize('k', [1, 2, 9])
@pytest.mark.parametrize('n_keys', [4096, 5003])
def test_brute_force(types, k, n_keys):
    queries, keys = unit(100, 24), unit(n_keys, 24, seed=1)
    own = torch.randint(-1, n_keys, (100,), generator=torch.Generator().manual_seed(2))
    own[:50] = exact(queries, keys, 1)[1][:50, 0]                     # the best one is not for them
    for exclude in (None, own):
        found, wanted = top_k(queries, keys, k, exclude=exclude), exact(queries, keys, k, exclude)
        same(found, wanted, queries, keys)
        assert (found[1] == wanted[1]).float().mean() > .999
        if exclude is not None:
            assert not (found[1] == own[:, None]).any()


def test_equal_scores_go_to_the_lower_index(types):
    g = torch.Generator().manual_seed(0)
    queries, keys = torch.randint(-2, 3, (90, 4), generator=g).float(), torch.randint(-2, 3, (6000, 4), generator=g).float()
    for exclude in (None, torch.randint(-1, 6000, (90,), generator=g)):
        for k in (1, 5):
            for got, wanted in zip(top_k(queries, keys, k, exclude=exclude), exact(queries, keys, k, exclude)):
                assert torch.equal(got, wanted)


def test_copies_spread_over_groups_and_spans(types):
    queries, keys = unit(80, 16), unit(9000, 16, seed=1)
    places = torch.arange(8999, 0, -997)
    keys[places] = queries[0]
    queries[1:40] = queries[0]
    for chunk in (40, 4096):                                          # four spans, or one
        found = top_k(queries, keys, 6, chunk)
        assert torch.equal(found[1][:40], places.sort().values[:6].expand(40, -1))


def test_near_ties_at_the_last_place(types):
    "Hundreds of keys whose scores bfloat16 cannot tell apart, float32 can."
    g = torch.Generator().manual_seed(0)
    queries, keys = unit(70, 32), .3 * unit(8000, 32, seed=1)
    for n in (30, 300):                                               # few: within the cut; many: all in doubt
        places = torch.randperm(8000, generator=g)[:n]
        rows = queries[0] * (1 - 2e-6 * torch.arange(n))[:, None]
        near = keys.clone()
        near[places] = rows
        for k in (2, 5):
            found, wanted = top_k(queries, near, k), exact(queries, near, k)
            same(found, wanted, queries, near)
            assert torch.equal(found[1][0], wanted[1][0])


def test_lengths_that_break_the_bound(types):
    queries, keys = unit(70, 8), unit(3000, 8, seed=1)
    for scale in (1e-25, 1e-12, 1e12):
        same(top_k(queries * scale, keys, 3), exact(queries * scale, keys, 3), queries * scale, keys)
    mixed = keys * torch.logspace(-20, 15, 3000)[torch.randperm(3000, generator=torch.Generator().manual_seed(0))][:, None]
    same(top_k(queries, mixed, 3), exact(queries, mixed, 3), queries, mixed)
    negative = -keys.abs(), queries.abs()
    same(top_k(negative[1], negative[0], 3), exact(negative[1], negative[0], 3), negative[1], negative[0])
    assert top_k(torch.zeros(70, 8), keys, 3)[1].tolist() == [[0, 1, 2]] * 70
    assert top_k(torch.ones(70, 8), torch.ones(3000, 8), 3)[1].tolist() == [[0, 1, 2]] * 70


def test_the_cut_never_loses_a_winner():
    "Random lengths and clusters, many draws: a query is either in doubt or right."
    sure = 0
    for seed in range(0, 12, 2):
        g = torch.Generator().manual_seed(seed)
        centres = torch.randn(30, 16, generator=g)
        draw = lambda n: (centres[torch.randint(30, (n,), generator=g)] + .1 * (1 + seed) * torch.randn(n, 16, generator=g)) * torch.exp(.3 * torch.randn(n, 1, generator=g))
        queries, keys = draw(64), draw(4000)
        for dtype in (torch.bfloat16, torch.float32):
            value, index, doubt = search._screen(queries, keys, 3, dtype, None)
            wanted = exact(queries, keys, 3)
            same((value[~doubt], index[~doubt]), [part[~doubt] for part in wanted], queries[~doubt], keys)
            sure += (~doubt).sum().item()
    assert sure > 400


MEMORY = '''
import resource, sys, numpy as np, torch
from selfclass.search import fit_kmeans, fit_pca
torch.set_num_threads(2)
file, wide = sys.argv[1:]
torch.linalg.eigh(torch.eye(256, dtype=torch.float64)), torch.randn(4096, 256) @ torch.randn(256, 256)       # what the libraries hold
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pca = fit_pca(file, 8, device="cpu")
out = np.lib.format.open_memmap(wide, mode="w+", dtype=np.float32, shape=(300_000, 8))
pca.transform(file, out=out, device="cpu")
found = fit_kmeans(file, 12, max_iter=2, device="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(found.labels_), np.isfinite(out).all())
'''


def test_memory_does_not_grow_with_the_file(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path/'rows.npy', mode='w+', dtype=np.float16, shape=(300_000, 256))     # 307 MB as float32
    block = np.random.default_rng(0).standard_normal((20_000, 256), dtype=np.float32)
    for start in range(0, 300_000, 20_000):
        rows[start:start + 20_000] = block + start / 1e5
    del rows
    (tmp_path/'memory.py').write_text(MEMORY)
    ran = python(tmp_path/'memory.py', tmp_path/'rows.npy', tmp_path/'wide.npy')
    assert ran.returncode == 0, ran.stderr[-2000:]
    megabytes, n, finite = ran.stdout.split()
    assert int(megabytes) < 200 and (n, finite) == ('300000', 'True'), ran.stdout


SEVERAL = '''
import sys, torch, torch.distributed as dist
import selfclass.search as search
from selfclass.search import fit_kmeans, fit_pca
search._chunk_rows = lambda device, width: 700
torch.set_num_threads(1)
rank, world, file, meet = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1: dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=world)
pca = fit_pca(file, 10, device="cpu")
found = fit_kmeans(pca.transform(file, device="cpu"), 25, device="cpu", seed=3)
wide = fit_kmeans(file, 300, device="cpu", max_iter=4)                    # some clusters lose all rows
torch.save([vars(pca), vars(found), vars(wide)], f"{meet}-{world}-{rank}.pt")
if world > 1: dist.destroy_process_group()
'''


def test_processes_agree(tmp_path):
    g = np.random.default_rng(0)
    rows = (5 * g.standard_normal((40, 64)))[g.integers(0, 40, 9000)] + g.standard_normal((9000, 64))
    np.save(tmp_path/'rows.npy', rows.astype(np.float16))
    (tmp_path/'several.py').write_text(SEVERAL)
    for world in (1, 2, 3):
        runs = [subprocess.Popen([sys.executable, tmp_path/'several.py', str(rank), str(world), tmp_path/'rows.npy', tmp_path/f'meet{world}'], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)}) for rank in range(world)]
        said = [run.communicate(timeout=120)[1] for run in runs]
        assert not any(run.returncode for run in runs), said[0][-2000:]
        found = [torch.load(tmp_path/f'meet{world}-{world}-{rank}.pt') for rank in range(world)]
        alone = found[0] if world == 1 else alone
        for parts in found:
            for mine, other in zip(parts, alone):
                for name, value in mine.items():
                    torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-6)
                assert 'labels_' not in mine or torch.equal(mine['labels_'], other['labels_'])


def test_beside_scikit_learn():
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA, IncrementalPCA
    from sklearn.metrics import adjusted_rand_score
    g = np.random.default_rng(0)
    x = ((8 * g.standard_normal((30, 50)))[g.integers(0, 30, 5000)] + g.standard_normal((5000, 50))).astype(np.float32) + 3
    ours, full, incremental = fit_pca(x, 12, device='cpu'), PCA(12, svd_solver='full').fit(x.astype(float)), IncrementalPCA(12, batch_size=1000).fit(x)
    sign = np.sign((ours.components_.numpy() * full.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(ours.components_.numpy(), sign * full.components_, atol=1e-4)
    np.testing.assert_allclose(ours.explained_variance_, full.explained_variance_, rtol=1e-5)
    assert ours.explained_variance_.sum() >= incremental.explained_variance_.sum() * (1 - 1e-6)
    rows = ours.transform(x, device='cpu')
    found, peer = fit_kmeans(rows, 30, device='cpu'), KMeans(30, n_init=5, random_state=0).fit(rows.numpy())
    assert found.inertia_ <= peer.inertia_ * 1.0001
    assert adjusted_rand_score(found.labels_, peer.labels_) > .999
    assert np.allclose(found.inertia_, ((rows - found.cluster_centers_[found.labels_])**2).sum(), rtol=1e-5)


def test_lloyd_skips_rows_without_changing_any():
    "The same labels as with every distance in every pass, well beyond the number of passes in which rows are skipped."
    x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    share = search._Share(x, 700, torch.device('cpu'))
    centres = x[:40].clone()
    for passes in (2, 5, 15, 40):
        found, labels, _, _ = search._lloyd(share, x.double().square().sum().item(), centres, passes, -1., '')
        slow = centres
        for _ in range(passes - 1):
            label = torch.cdist(x.double(), slow.double()).argmin(1)
            slow = torch.stack([x[label == c].double().mean(0) for c in range(40)]).float()
        assert torch.equal(torch.cat(labels), torch.cdist(x.double(), slow.double()).argmin(1))
        torch.testing.assert_close(found, slow, rtol=0, atol=1e-5)


def test_all_rows_equal_and_more_clusters_than_rows_that_differ():
    assert fit_kmeans(np.full((50, 3), 7., np.float32), 5, device='cpu').inertia_ == 0
    few = np.repeat(np.eye(3, dtype=np.float32), 20, 0)
    found = fit_kmeans(few, 6, device='cpu')
    assert found.inertia_ < 1e-6 and len(found.labels_.unique()) == 3
