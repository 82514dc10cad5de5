"""k-means on features: what it shares with scikit-learn, with a full PCA, with another order of files and another number of processes."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, python
from selfclass.core import load_arrays
from selfclass.data import ImageSet
from selfclass.embed import save_embeddings
from selfclass.errors import DataError, MissingInputError, ParamsError
from selfclass.kmeans import (backbone_features, cluster_splits, fit_clusters, fit_reduction, load_clusters, pixel_features, read_features,
                              save_clusters, sweep_clusters, unit_rows)
from selfclass.metrics import cluster_scores, score_run, transfer_scores
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA, IncrementalPCA


def blobs(n, width=24, k=8, seed=0, spread=1.):
    "Rows around k centres, and the centre of each; the centres are those of the width alone."
    g, centres = np.random.default_rng(seed), 2.2 * np.random.default_rng(99).standard_normal((k, width))
    label = g.integers(0, k, n)
    return (centres[label] + spread * g.standard_normal((n, width))).astype(np.float32), label


def stretched(n, width, seed=0):
    "Rows whose axes are told apart by their lengths, turned and away from the origin."
    g = np.random.default_rng(seed)
    turn = np.linalg.qr(g.standard_normal((width, width)))[0]
    return ((g.standard_normal((n, width)) * .8 ** np.arange(width)) @ turn + 3).astype(np.float32)


@pytest.fixture(scope='module')
def rows():
    return blobs(2100)


# PCA

@pytest.mark.parametrize('n', [4096 + 5, 4096 + 1, 4095])
def test_streaming_pca_is_the_full_one(tmp_path, n):
    "Also where a last batch of the paper's size would hold fewer rows than components."
    x = stretched(n, 24)
    np.save(tmp_path/'x.npy', x)
    reduction, full = fit_reduction(tmp_path/'x.npy', 10, device='cpu'), PCA(10, svd_solver='full').fit(x.astype(np.float64))
    np.testing.assert_allclose(np.abs((reduction.pca.components_.numpy() * full.components_).sum(1)), 1, atol=1e-4)
    np.testing.assert_allclose(reduction.pca.explained_variance_.numpy(), full.explained_variance_, rtol=1e-4)
    np.testing.assert_allclose(np.abs(reduction.transform(x).numpy()), np.abs(full.transform(x)), atol=5e-3)


def test_uneven_last_batch(monkeypatch):
    "Blocks of any size give the same axes, the last one of a single row included."
    import selfclass.search as search
    x = stretched(1001, 12)
    found = []
    for chunk in (1001, 500, 250, 7):
        monkeypatch.setattr(search, '_chunk_rows', lambda device, width, chunk=chunk: chunk)
        found.append(fit_reduction(x, 5, device='cpu').transform(x))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)


def test_beside_incremental_pca():
    "The paper's batch, max(4096, 2 D): the leading subspace is the same."
    x = stretched(9000, 32)
    theirs = IncrementalPCA(6, batch_size=max(4096, 2 * 32)).fit(x)
    ours = fit_reduction(x, 6, device='cpu').pca
    cosines = np.linalg.svd(theirs.components_ @ ours.components_.numpy().T, compute_uv=False)
    assert cosines.min() > .999


# k-means

def test_beside_mini_batch_kmeans():
    "The scores agree within the seeds' spread, and Lloyd's clusters are at least as tight."
    (x, y), (held, held_y) = blobs(1500, spread=3.), blobs(800, seed=1, spread=3.)
    scores = lambda train, test: transfer_scores(train, y, test, held_y, 8)['acc_tr']
    ours, theirs, tight, loose = [], [], [], []
    for seed in range(5):
        model = fit_clusters(x, 8, n_init=3, seed=seed, device='cpu')
        mini = MiniBatchKMeans(8, batch_size=2048, max_iter=60, n_init=3, random_state=seed).fit(x)
        ours.append(scores(model.kmeans.labels_.numpy(), model.predict(held).numpy()))
        theirs.append(scores(mini.labels_, mini.predict(held)))
        tight.append(model.mean_distance), loose.append(mini.inertia_ / len(x))
    spread = np.std(ours, ddof=1) + np.std(theirs, ddof=1) + .01
    assert .5 < np.mean(ours) < 1 and abs(np.mean(ours) - np.mean(theirs)) <= 2 * spread
    assert np.mean(tight) <= np.mean(loose) * 1.001


def test_seeds_share_no_start(rows, monkeypatch):
    "With several starts each, seeds 0 and 1 of search.fit_kmeans would share all but one."
    import selfclass.kmeans as kmeans
    seen = []
    real = kmeans.fit_kmeans
    monkeypatch.setattr(kmeans, 'fit_kmeans', lambda *args, seed, **rest: seen.append(seed) or real(*args, seed=seed, **rest))
    for seed in range(3):
        cluster_splits({'train': {'features': rows[0][:300]}}, (4, 4, 5), n_init=2, seed=seed, device='cpu')
    assert len(seen) == 9 and np.diff(sorted(seen)).min() > 100


@pytest.mark.parametrize('normalize, n_components', [(False, None), (True, None), (False, 5), (True, 5)])
def test_saved_clusters_predict_the_same(tmp_path, rows, normalize, n_components):
    model = fit_clusters(rows[0], 8, n_components, normalize, seed=2, device='cpu')
    again = load_clusters(save_clusters(model, tmp_path/'a', seed=2, features='blobs'))
    new, _ = blobs(300, seed=5)
    assert torch.equal(again.predict(new), model.predict(new)) and torch.equal(again.predict_proba(new), model.predict_proba(new))
    assert torch.equal(again.kmeans.labels_, model.kmeans.labels_) and again.mean_distance == model.mean_distance
    assert again.facts['features'] == 'blobs' and again.facts['clusters']['n_components'] == n_components
    save_clusters(fit_clusters(rows[0], 8, n_components, normalize, seed=2, device='cpu'), tmp_path/'b', features='blobs', seed=2)
    for name in ('model.safetensors', 'config.json'):
        assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes()


def test_saved_clusters_in_a_fresh_process(tmp_path, rows):
    model = fit_clusters(rows[0], 8, 6, True, device='cpu')
    save_clusters(model, tmp_path/'model')
    np.save(tmp_path/'new.npy', blobs(200, seed=7)[0])
    ran = python('-c', 'import sys; from selfclass.kmeans import load_clusters; print(*load_clusters(sys.argv[1]).predict(sys.argv[2]).tolist())',
                 tmp_path/'model', tmp_path/'new.npy')
    assert ran.returncode == 0, ran.stderr[-1500:]
    assert [int(word) for word in ran.stdout.split()] == model.predict(tmp_path/'new.npy').tolist()


def test_probabilities_are_those_of_the_mixture(rows):
    from scipy.stats import multivariate_normal
    model = fit_clusters(rows[0], 8, 3, device='cpu')
    x, centres = model.reduction.transform(rows[0][:50]).double().numpy(), model.kmeans.cluster_centers_.double().numpy()
    density = np.stack([multivariate_normal(c, model.mean_distance / 3).pdf(x) for c in centres], 1)
    np.testing.assert_allclose(model.predict_proba(rows[0][:50]).numpy(), density / density.sum(1, keepdims=True), atol=1e-4)
    assert torch.equal(model.predict_proba(rows[0]).argmax(1), model.predict(rows[0]))


SEVERAL = '''
import sys, torch, torch.distributed as dist
import selfclass.search as search
from selfclass.kmeans import cluster_splits, fit_clusters, read_features
search._chunk_rows = lambda device, width: 500
torch.set_num_threads(1)
rank, world, file, meet = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1: dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=world)
model = fit_clusters(file, 8, 6, normalize=True, device="cpu", seed=3)
_, made, loss = cluster_splits({"train": read_features(file)}, (8, 12), 5, device="cpu", seed=1)
torch.save([model.kmeans.labels_, model.kmeans.cluster_centers_, model.predict_proba(file), torch.tensor(made["train"]["probs_1"]), torch.tensor(loss)], f"{meet}-{rank}.pt")
if world > 1: dist.destroy_process_group()
'''


def test_two_processes_are_one(tmp_path, rows):
    np.save(tmp_path/'rows.npy', rows[0])
    (tmp_path/'several.py').write_text(SEVERAL)
    found = {}
    for world in (1, 2):
        runs = [subprocess.Popen([sys.executable, tmp_path/'several.py', str(rank), str(world), tmp_path/'rows.npy', tmp_path/f'meet{world}'], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)}) for rank in range(world)]
        said = [run.communicate(timeout=280)[1] for run in runs]
        assert not any(run.returncode for run in runs), said[0][-2000:]
        found[world] = [torch.load(tmp_path/f'meet{world}-{rank}.pt') for rank in range(world)]
    for mine in found[2]:
        for tensor, other in zip(mine, found[1][0]):
            torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(mine[0], found[1][0][0])


# features from files

@pytest.fixture
def shards(tmp_path, rows):
    "The same rows as .npz, .npy and Parquet, in twelve files each."
    import pyarrow as pa
    import pyarrow.parquet as pq
    for n, (x, y) in enumerate(zip(np.array_split(rows[0], 12), np.array_split(rows[1], 12))):
        for kind in ('npz', 'npy', 'parquet'):
            (tmp_path/kind).mkdir(exist_ok=True)
        np.savez(tmp_path/'npz'/f'train-{n}.npz', features=x, labels=y)
        np.save(tmp_path/'npy'/f'part{n}.npy', x)
        pq.write_table(pa.table({'id': [f'{n}/{i}' for i in range(len(x))], 'features': list(x), 'label': y}), tmp_path/'parquet'/f'train-{n}-of-12.parquet')
    np.savez(tmp_path/'npz'/'test-0.npz', features=rows[0][:5], labels=rows[1][:5])
    return tmp_path


@pytest.mark.parametrize('kind', ['npz', 'npy', 'parquet'])
def test_ids_do_not_depend_on_the_order_of_files(shards, rows, kind):
    files = [file for file in (shards/kind).iterdir() if not file.name.startswith('test')]
    wanted = fit_clusters(rows[0], 8, 5, seed=1, device='cpu').kmeans.labels_
    for listed in (sorted(files), sorted(files, reverse=True), [files[i] for i in np.random.default_rng(0).permutation(12)], shards/kind):
        found = read_features(listed)
        np.testing.assert_array_equal(found['features'], rows[0])
        assert kind == 'npy' and 'labels' not in found or np.array_equal(found['labels'], rows[1])
        assert torch.equal(fit_clusters(found['features'], 8, 5, seed=1, device='cpu').kmeans.labels_, wanted)


def test_parquet_beyond_lists_of_floats(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    x = np.arange(12, dtype=np.float64).reshape(4, 3)
    pq.write_table(pa.table({'embeddings': pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 3)}), tmp_path/'fixed.parquet')
    np.testing.assert_array_equal(read_features(tmp_path/'fixed.parquet', name='embeddings')['features'], x)
    assert 'labels' not in read_features(tmp_path/'fixed.parquet', name='embeddings')
    for broken in ([[1., 2.], [3.]], [[1., 2.], None], [[], []]):
        pq.write_table(pa.table({'features': pa.array(broken, pa.list_(pa.float64()))}), tmp_path/'broken.parquet')
        with pytest.raises(DataError, match='lists of one length'):
            read_features(tmp_path/'broken.parquet')
    with pytest.raises(DataError, match="did you mean 'embeddings'"):
        read_features(tmp_path/'fixed.parquet', name='embedding')
    (tmp_path/'no.parquet').write_bytes(b'nothing of the kind')
    with pytest.raises(DataError, match='no.parquet'):
        read_features(tmp_path/'no.parquet')


def test_pyarrow_is_asked_for_late(shards):
    "A machine without it reads .npz, and is told what it lacks for Parquet."
    code = f'''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pyarrow": raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from selfclass.errors import DataError
from selfclass.kmeans import read_features
print(read_features({str(shards/'npz')!r})["features"].shape)
try: read_features({str(shards/'parquet')!r})
except DataError as error: print(error)
'''
    ran = python('-c', code)
    assert ran.returncode == 0, ran.stderr[-1500:]
    assert '(2100, 24)' in ran.stdout and 'needs pyarrow' in ran.stdout


def test_a_run_of_the_pipeline_is_read(tmp_path, rows):
    "What embed writes goes in, what cluster reads comes out."
    (x, y), (held, held_y) = rows, blobs(400, seed=3)
    save_embeddings(tmp_path/'in.npz', {'train': {'features': x, 'probs_0': np.ones((2100, 1)), 'labels': y}, 'test': {'features': held, 'labels': held_y}}, (1,))
    splits = {split: read_features(tmp_path/'in.npz', split) for split in ('train', 'test')}
    heads, made, loss = cluster_splits(splits, (8, 8, 12), 6, n_init=2, device='cpu')
    scores = score_run(load_arrays(save_embeddings(tmp_path/'out.npz', made, [head.n_clusters for head in heads], loss)))
    best = scores['best_head']
    assert best == loss[:2].argmin() and scores['acc'] == cluster_scores(heads[best].predict(held).numpy(), held_y, 8)['acc'] > .9
    assert scores['acc_over_12'] > .9 and scores['acc_tr'] == scores['acc']
    first = (tmp_path/'out.npz').read_bytes()
    save_embeddings(tmp_path/'out.npz', cluster_splits(splits, (8, 8, 12), 6, n_init=2, device='cpu')[1], (8, 8, 12), loss)
    assert (tmp_path/'out.npz').read_bytes() == first


def test_labels_change_nothing(rows):
    given = cluster_splits({'train': {'features': rows[0], 'labels': rows[1]}}, (8,), device='cpu')
    without = cluster_splits({'train': {'features': rows[0]}}, (8,), device='cpu')
    assert torch.equal(given[0][0].kmeans.labels_, without[0][0].kmeans.labels_) and 'labels' not in without[1]['train']


def test_sweep(rows):
    score = lambda train, test, k: {'acc': cluster_scores(test, rows[1][:100], k)['acc_many_to_one']}
    table = sweep_clusters(rows[0], rows[0][:100], score, (1, 6), (4, 8), seeds=(0, 1), device='cpu')
    assert [(row['dimensions'], row['clusters'], row['seed']) for row in table] == [(n, k, s) for n in (1, 6) for k in (4, 8) for s in (0, 1)]
    mean = lambda n, k: np.mean([row['acc'] for row in table if row['dimensions'] == n and row['clusters'] == k])
    assert mean(6, 8) > mean(6, 4) + .1 and mean(6, 8) > mean(1, 8) + .1
    alone = fit_clusters(rows[0], 8, 6, seed=1, device='cpu')
    assert table[-1]['mean_distance'] == pytest.approx(alone.mean_distance, rel=1e-4)


# bad input

def holed(x, value, row=77):
    x = x.copy()
    x[row] = value
    return x


@pytest.mark.parametrize('normalize, n_components', [(False, None), (True, None), (False, 5), (True, 5)])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers(rows, normalize, n_components, value):
    with pytest.raises(DataError, match='finite'):
        fit_clusters(holed(rows[0], value), 8, n_components, normalize, device='cpu')
    model = fit_clusters(rows[0], 8, n_components, normalize, device='cpu')
    for ask in (model.predict, model.predict_proba):
        with pytest.raises(DataError, match='finite'):
            ask(holed(rows[0], value))


def test_rows_of_zeros(rows):
    with pytest.raises(DataError, match='1 of 2100 features are zero .* the first is row 77; .*normalize=False'):
        fit_clusters(holed(rows[0], 0), 8, normalize=True, device='cpu')
    assert fit_clusters(holed(rows[0], 0), 8, device='cpu').n_clusters == 8
    with pytest.raises(DataError, match='row 77'):
        unit_rows(holed(rows[0], 0))


@pytest.mark.parametrize('call, words', [
    (lambda x: fit_clusters(x[:7], 8), 'n_clusters should be 1..7, the number of rows, found 8'),
    (lambda x: fit_clusters(x, 0), 'found 0'),
    (lambda x: fit_clusters(x, 8, n_components=25), r'n_components should be 1..24'),
    (lambda x: fit_clusters(x, 8, n_components=0), r'n_components should be 1..24'),
    (lambda x: fit_clusters(x, 8, seed='0'), 'seed should be a whole number'),
    (lambda x: fit_clusters(x, 8, n_init=0), 'n_init=0'),
    (lambda x: cluster_splits({'train': {'features': x[:7]}}, (4, 8)), 'n_clusters should be 1..7'),
    (lambda x: sweep_clusters(x, x, dict, (2,), (2,), seeds=()), 'empty list'),
])
def test_numbers_out_of_range(rows, call, words):
    with pytest.raises(ParamsError, match=words) as error:
        call(rows[0])
    assert '\n' not in str(error.value)


def test_files_that_are_none(tmp_path, rows):
    with pytest.raises(MissingInputError):
        fit_clusters(tmp_path/'none.npy', 3)
    with pytest.raises(MissingInputError):
        fit_clusters(tmp_path/'none.npy', 3, normalize=True)
    (tmp_path/'text.npy').write_text('no array')
    for normalize in (False, True):
        with pytest.raises(DataError, match='is no .npy file'):
            fit_clusters(tmp_path/'text.npy', 3, normalize=normalize)
    with pytest.raises(DataError, match='holds no .npz'):
        (tmp_path/'empty').mkdir() or read_features(tmp_path/'empty')
    np.savez(tmp_path/'a.npz', features=rows[0][:, :4]), np.savez(tmp_path/'b.npz', features=rows[0])
    with pytest.raises(DataError, match=r'widths \[4, 24\]'):
        read_features([tmp_path/'a.npz', tmp_path/'b.npz'])
    with pytest.raises(DataError, match='24 columns'):
        fit_clusters(rows[0], 3).predict(rows[0][:, :4])


def test_damaged_model(tmp_path, rows):
    folder = save_clusters(fit_clusters(rows[0], 3, device='cpu'), tmp_path/'m')
    whole = (folder/'model.safetensors').read_bytes()
    (folder/'model.safetensors').write_bytes(whole[:200])
    with pytest.raises(DataError, match='not a whole safetensors file'):
        load_clusters(folder)
    (folder/'model.safetensors').unlink()
    with pytest.raises(MissingInputError, match='save_clusters'):
        load_clusters(folder)


# features of pictures

def test_supervised_weights_from_disk(tmp_path):
    "Features are the pooled output of torchvision's network, whether or not the file counts batches."
    from torchvision.models import resnet18
    torch.manual_seed(0)
    net = resnet18(weights=None).eval()
    state = net.state_dict()
    torch.save(state, tmp_path/'new.pth')
    torch.save({key: value for key, value in state.items() if 'num_batches' not in key}, tmp_path/'old.pth')
    net.fc = torch.nn.Identity()
    photos = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    plain = lambda batch: torch.stack(list(batch)).float() / 255
    with torch.no_grad():
        wanted = net(plain(photos)).numpy()
    for name in ('new.pth', 'old.pth'):
        np.testing.assert_allclose(backbone_features(photos, tmp_path/name, 'resnet18', plain=plain, device='cpu'), wanted, atol=1e-4)
    with pytest.raises(DataError, match='resnet34'):
        backbone_features(photos, tmp_path/'new.pth', 'resnet34', device='cpu')
    with pytest.raises(MissingInputError):
        backbone_features(photos, tmp_path/'gone.pth', 'resnet18', device='cpu')


def test_pixels():
    images = ImageSet('noise', torch.randint(0, 256, (9, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    found = pixel_features(images)
    assert found.shape == (9, 60) and found.dtype == np.float32 and found.max() <= 1
    np.testing.assert_allclose(found[2] * 255, images.pixels[2].flatten().numpy(), atol=1e-4)
    with pytest.raises(DataError, match='on demand'):
        pixel_features(ImageSet('files', files=(Path('a.png'),)))


def test_one_cluster_is_everything():
    "K = 1: the centre is the mean, and every image is in it with probability 1."
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    heads, made, loss = cluster_splits({'train': {'features': x, 'labels': np.arange(40) % 4}}, (1,), device='cpu')
    assert made['train']['probs_0'].shape == (40, 1) and np.allclose(made['train']['probs_0'], 1)
    assert np.isclose(loss[0], ((x - x.mean(0))**2).sum(1).mean(), rtol=1e-4)
    assert cluster_scores(np.zeros(40, int), np.arange(40) % 4)['acc'] == pytest.approx(.25)
