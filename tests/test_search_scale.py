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
    queries, keys = torch.randint(-2, 3, (90, 7), generator=g).float(), torch.randint(-2, 3, (6000, 7), generator=g).float()     # few copies, many ties
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


def last_block_is_rounded_otherwise(monkeypatch):
    "Every product with fewer columns than the first one of a search is one unit in the last place larger, as another order of summation can make it."
    block = search._search_block

    def larger(queries, keys, k, chunk, exclude):
        if len(keys) % chunk:
            full = len(keys) - len(keys) % chunk
            keys = torch.cat([keys[:full], keys[full:] * (1 + 2**-20)])
        return block(queries, keys, k, chunk, exclude)
    monkeypatch.setattr(search, '_search_block', larger)


@pytest.mark.parametrize('n_queries, n_keys, chunk', [(3, 1001, 100), (3, 1001, 1000), (70, 5003, 500), (70, 5003, 4096), (130, 3001, 64), (65, 2100, 4096)])
def test_copies_in_a_short_last_block(types, monkeypatch, n_queries, n_keys, chunk):
    "Copies in every block and in the last one, k on either side of the tie; also where the last block is rounded upwards."
    queries, keys = unit(n_queries, 16), unit(n_keys, 16, seed=1)
    places = torch.cat([torch.arange(3, n_keys - 1, 97), torch.tensor([n_keys - 1])])
    keys[places] = queries[0].expand(len(places), -1).clone()
    queries[1::2] = queries[0]
    wanted = exact(queries, keys, 60)
    last_block_is_rounded_otherwise(monkeypatch)
    for k in (1, len(places) - 1, len(places), len(places) + 2):
        for exclude in (None, places[:1].expand(n_queries), places[-1:].expand(n_queries)):
            _, index = top_k(queries, keys, min(k, 60), chunk, exclude)
            left = places if exclude is None else places[places != exclude[0]]
            n = min(k, 60, len(left))
            assert torch.equal(index[[0, 1]][:, :n], left[:n].expand(2, -1))
            assert all(len(set(row)) == len(row) for row in index.tolist())
    tied = torch.equal(search._search_block(queries, keys, 2, chunk, None)[1][0], wanted[1][0, :2])
    assert tied == (n_keys % chunk == 0 or n_keys < chunk), 'the plain blocks should be led astray, or this test shows nothing'


def test_pairs_of_copies_everywhere(types):
    "Each key twice, in any order: twins stand together, the lower index first."
    half = unit(2500, 12, seed=1)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    keys, queries = torch.cat([half, half])[order], unit(80, 12)
    for chunk in (300, 999, 4096):
        value, index = top_k(queries, keys, 8, chunk)
        first, second = index[:, ::2], index[:, 1::2]
        assert torch.equal(keys[first], keys[second]) and (first < second).all() and torch.equal(value[:, ::2], value[:, 1::2])
        best = top_k(queries, half, 4, chunk)
        assert torch.equal(order[first] % 2500, best[1])
        odd = top_k(queries, keys, 7, chunk, exclude=first[:, 0])
        assert torch.equal(odd[1], index[:, 1:])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_copies_of_other_types(dtype):
    queries, keys = unit(20, 8).to(dtype), unit(300, 8, seed=1).to(dtype)
    keys[[5, 100, 299]] = queries[0]
    keys[100, 0] = keys[100, 0] + 0.
    index = top_k(queries[:1], keys, 3, chunk=128)[1]
    assert index.tolist() == [[5, 100, 299]]
    zeros = torch.zeros(9, 4, dtype=dtype)
    zeros[3:] = -0.
    assert top_k(queries[:, :4], zeros, 9, chunk=4)[1].tolist() == [list(range(9))] * 20


class Lowered:
    "Autocast, or a lowered precision under torch's old or new names; all as it was afterwards."
    ways = 'autocast', 'high', 'medium', 'new name', 'autocast and medium'

    def __init__(self, way):
        self.way, self.places = way, (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)

    def __enter__(self):
        self.before = [place.fp32_precision for place in self.places]
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16, enabled='autocast' in self.way)
        self.autocast.__enter__()
        if self.way == 'new name':
            self.places[0].fp32_precision, self.places[1].fp32_precision = 'bf16', 'tf32'
        elif self.way != 'autocast':
            torch.set_float32_matmul_precision(self.way.split()[-1])

    def __exit__(self, *error):
        if self.way != 'new name':
            torch.set_float32_matmul_precision('highest')
        for place, precision in zip(self.places, self.before):
            place.fp32_precision = precision
        self.autocast.__exit__(*error)


def lowered_state():
    return torch.is_autocast_enabled('cpu'), [place.fp32_precision for place in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)]


@pytest.mark.parametrize('way', Lowered.ways)
def test_exact_in_any_precision(types, monkeypatch, way):
    "The same bits as without, in full precision at every product, and the surroundings as they were, after an error too."
    queries, keys = unit(90, 24), unit(5003, 24, seed=1)
    rows = torch.cat([10 * unit(9, 24)] * 30) + unit(270, 24, seed=3)
    work = [lambda: top_k(queries, keys, 5), lambda: top_k(queries[:3], keys, 5, 400), lambda: vars(fit_pca(keys, 3, device='cpu')).values(),
            lambda: fit_pca(keys, 3, device='cpu').transform(keys, device='cpu'), lambda: vars(fit_kmeans(rows, 9, device='cpu')).values(),
            lambda: fit_kmeans(rows, 9, device='cpu').predict(rows, device='cpu')]
    wanted, states = [do() for do in work], []
    for name in ('_product', '_two_nearest', '_search_block', '_add_moments'):
        real = getattr(search, name)
        monkeypatch.setattr(search, name, lambda *args, real=real: (states.append(lowered_state()), real(*args))[1])
    with Lowered(way):
        around = lowered_state()
        found = [do() for do in work]
        with pytest.raises(search.DataError, match='in row 2;'):
            top_k(queries, torch.where(torch.arange(5003)[:, None] == 2, torch.nan, keys), 5)
        assert lowered_state() == around and around[0] == ('autocast' in way) and (way == 'autocast' or around[1][0] in ('bf16', 'tf32'))
    assert len(states) > 10 and all(not on and set(precision) <= {'none', 'ieee'} for on, precision in states)
    for got, want in zip(found, wanted):
        for a, b in zip(got, want) if not isinstance(got, torch.Tensor) else [(got, want)]:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_arrays_are_as_good_as_tensors():
    queries, keys = unit(5, 8), unit(40, 8, seed=1)
    own, wanted = torch.arange(5), top_k(queries, keys, 3, exclude=torch.arange(5))
    backward, frozen = keys.numpy()[::-1].copy()[::-1], queries.numpy().copy()
    frozen.setflags(write=False)
    for q, n, e in ((frozen, backward, own.numpy()), (queries, backward, own), (frozen, keys, own.numpy()), (queries.numpy().astype('>f4'), keys, own)):
        for got, want in zip(top_k(q, n, 3, exclude=e), wanted):
            assert torch.equal(got, want)
    for wrong, name in (((queries.tolist(), keys), 'queries'), ((queries, np.array([['a']])), 'keys'), ((queries, keys.numpy().astype(int)), 'keys'), ((queries.numpy(), None), 'keys')):
        with pytest.raises(search.DataError, match=f'^{name} should be'):
            top_k(*wrong, 3)
    with pytest.raises(search.DataError, match='^exclude should be'):
        top_k(queries, keys, 3, exclude=np.arange(5.))
    for k in (2.5, '2', None):
        with pytest.raises(search.ParamsError, match='^k should be a whole number'):
            top_k(queries, keys, k)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 1e20, -3e38])
def test_the_row_that_cannot_be_computed_with_is_named(value, tmp_path):
    good = unit(300, 6)
    bad = good.clone()
    bad[217, 3] = value
    np.save(tmp_path/'bad.npy', bad.numpy())
    for source in (bad, bad.numpy(), bad.numpy().astype(float), tmp_path/'bad.npy'):
        for fit in (lambda x: fit_pca(x, 2, device='cpu'), lambda x: fit_kmeans(x, 4, device='cpu'), lambda x: fit_pca(good, 2, device='cpu').transform(x, device='cpu'),
                    lambda x: fit_kmeans(good, 4, device='cpu').predict(x, device='cpu')):
            with pytest.raises(search.DataError, match=r'^source should be finite.* in row 217;'):
                fit(source)
    long = 1e20 * good
    for asked, given, name in ((bad, good, 'queries'), (good, bad, 'keys')):
        if not np.isfinite(value):
            with pytest.raises(search.DataError, match=f'^{name} should be finite, found NaN or infinity in row 217;'):
                top_k(asked, given, 2)
        elif abs(value) == 1e20:
            assert top_k(asked, given, 1)[0].isfinite().all()                   # long rows have scores beside unit rows
            with pytest.raises(search.DataError, match=f'in row 217 of {name}'):
                top_k(asked, long, 2) if name == 'queries' else top_k(long, given, 2)


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
        found, labels, _, _ = search._lloyd(share, centres, passes, -1., '')
        slow = centres
        for _ in range(passes - 1):
            label = torch.cdist(x.double(), slow.double()).argmin(1)
            slow = torch.stack([x[label == c].double().mean(0) for c in range(40)]).float()
        assert torch.equal(torch.cat(labels), torch.cdist(x.double(), slow.double()).argmin(1))
        torch.testing.assert_close(found, slow, rtol=0, atol=1e-5)


def two_sources(apart, n=24_000, width=12, seed=0):
    "Rows far from zero, sorted by source: a twentieth around one place, the others around a place `apart` from it; 8 clusters each."
    g = np.random.default_rng(seed)
    source = (np.arange(n) >= n // 20).astype(int)
    centres = 5000 + apart * np.array([0, 1])[:, None, None] / width**.5 + 12 * g.standard_normal((2, 8, width))
    return (centres[source, g.integers(0, 8, n)] + g.standard_normal((n, width))).astype(np.float32), g.permutation(n)


@pytest.mark.parametrize('apart', [0, 1e3, 1e4])
def test_the_order_of_rows_does_not_matter(apart, monkeypatch):
    "Sorted by source and shuffled, beside scikit-learn in float64: variances to 1e-6 of their sum, inertia to 1e-5 of itself."
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import pairwise_distances_argmin_min
    monkeypatch.setattr(search, '_chunk_rows', lambda device, width: 3000)
    x, order = two_sources(apart)
    wide = x.astype(float)
    peer = PCA(12, svd_solver='full').fit(wide)
    for rows in (x, x[order]):
        ours = fit_pca(rows, 12, device='cpu')
        off = np.abs(ours.explained_variance_.numpy() - peer.explained_variance_).max()
        assert off <= 1e-6 * peer.explained_variance_.sum(), off / peer.explained_variance_.sum()
        np.testing.assert_allclose(ours.mean_, peer.mean_, rtol=1e-6)
    found = [fit_kmeans(rows, 16, n_init=4, device='cpu') for rows in (x, x[order])]
    for mine in found:
        nearest, distance = pairwise_distances_argmin_min(wide if mine is found[0] else wide[order], mine.cluster_centers_.double().numpy())
        assert (nearest == mine.labels_.numpy()).mean() > .9999
        np.testing.assert_allclose(mine.inertia_, (distance**2).sum(), rtol=1e-5)
    again = KMeans(16, init=found[0].cluster_centers_.double().numpy(), n_init=1).fit(wide)
    np.testing.assert_allclose([mine.inertia_ for mine in found], again.inertia_, rtol=1e-5)


class Counted(np.ndarray):
    "An array that counts how often its rows are read."
    reads = 0

    def __getitem__(self, key):
        if isinstance(key, slice):
            Counted.reads += len(range(*key.indices(len(self))))
        return np.asarray(super().__getitem__(key))


def test_rows_are_read_once_a_pass():
    x = np.random.default_rng(0).normal(size=(9000, 16)).astype(np.float32).view(Counted)
    fit_pca(x, 4, device='cpu')
    assert Counted.reads <= 9000 + 256
    Counted.reads = 0
    found = fit_kmeans(x, 20, device='cpu')
    assert Counted.reads <= 9000 + 2 * 4096 and found.n_iter_ > 3               # small enough to be kept: once, and the sample


def test_all_rows_equal_and_more_clusters_than_rows_that_differ():
    assert fit_kmeans(np.full((50, 3), 7., np.float32), 5, device='cpu').inertia_ == 0
    few = np.repeat(np.eye(3, dtype=np.float32), 20, 0)
    found = fit_kmeans(few, 6, device='cpu')
    assert found.inertia_ < 1e-6 and len(found.labels_.unique()) == 3


@pytest.mark.parametrize('kinds, k, offset', [(1, 4, 0.), (3, 6, .1), (7, 300, 1000.3), (40, 41, 0.), (40, 900, 3.7)])
def test_fewer_different_rows_than_clusters_end_early(kinds, k, offset):
    "A few passes, a cluster for each kind of row, finite centres for the others, and labels that prediction repeats."
    g = np.random.default_rng(kinds)
    kind = np.concatenate([np.arange(kinds), g.integers(0, kinds, 2000 - kinds)])
    x = (offset + g.standard_normal((kinds, 5))).astype(np.float32)[kind]
    found = fit_kmeans(x, k, device='cpu')
    assert found.n_iter_ <= 5 and found.cluster_centers_.isfinite().all() and found.cluster_centers_.shape == (k, 5)
    assert found.inertia_ <= 1e-9 * (x.astype(float)**2).sum() and len(found.labels_.unique()) == kinds
    assert len(set(zip(kind.tolist(), found.labels_.tolist()))) == kinds
    np.testing.assert_allclose(found.cluster_centers_[found.labels_], x, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.predict(x, device='cpu'), found.labels_)


def test_results_introduce_themselves():
    x = unit(50, 4)
    pca, found = fit_pca(x, 2, device='cpu'), fit_kmeans(x, 3, device='cpu')
    assert repr(pca) == f'PCA(2 of 4 axes, {pca.explained_variance_ratio_.sum():.1%} of the variance)'
    assert repr(found) == f'KMeans(3 clusters of 50 rows of 4 numbers, inertia {found.inertia_:.6g}, passes {found.n_iter_})'


def test_examples_of_the_docstrings():
    import doctest
    ran = doctest.testmod(search, extraglobs={'np': np})
    assert ran.attempted >= 4 and ran.failed == 0
