"""PCA and k-means of features: against the incremental methods of the k-means paper (scikit-learn) and against faiss."""
import numpy as np
import torch

from benchmarks.harness import Row, gemm_rate
from selfclass.search import fit_kmeans, fit_pca

WIDTH, AXES, CLUSTERS, PASSES = 2048, 256, 1000, 20


def features(n, width=WIDTH, centres=1200, seed=0):
    "n rows around 1200 centres with a spectrum that decays as a power law, as features do; float32, seeded."
    g = np.random.default_rng(seed)
    scale = (1 + np.arange(width, dtype=np.float32))**-.5
    x = (g.standard_normal((centres, width), dtype=np.float32) * scale)[g.integers(0, centres, n)]
    for part in np.array_split(x, max(1, n // 4096)):
        part += .7 * scale * g.standard_normal(part.shape, dtype=np.float32)
    return x


def ours(x):
    "Full PCA, then Lloyd's algorithm."
    pca = fit_pca(x, AXES, device='cpu')
    return x, fit_kmeans(pca.transform(x, device='cpu'), CLUSTERS, max_iter=PASSES, device='cpu').labels_.numpy()


def theirs(x):
    "The paper's method: incremental PCA in batches of max(4096, 2 n), mini-batch k-means in batches of max(2048, k), 20 epochs."
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import IncrementalPCA
    y = IncrementalPCA(AXES, batch_size=max(4096, 2 * AXES)).fit(x).transform(x).astype(np.float32)
    return x, MiniBatchKMeans(CLUSTERS, batch_size=2048, max_iter=PASSES, max_no_improvement=None, n_init=1, random_state=0).fit(y).labels_


def inertia(rows, labels):
    "Sum of squared distances from the means of the clusters."
    rows, labels = torch.as_tensor(rows).double(), torch.as_tensor(labels)
    sums = torch.zeros(CLUSTERS, rows.shape[1], dtype=torch.float64).index_add_(0, labels, rows)
    return (rows - (sums / labels.bincount(minlength=CLUSTERS).clamp(min=1)[:, None])[labels]).square().sum().item()


def no_worse(mine, other):
    "Our inertia is equal or lower, both in the space of the same exact PCA."
    x, labels = mine
    rows = fit_pca(x, AXES, device='cpu').transform(x, device='cpu')
    found, given = inertia(rows, labels), inertia(rows, other[1])
    assert found <= given, f'inertia {found:.6g}, the peer has {given:.6g}'


def floor(x):
    "Covariance and axes in float32, and one full pass of k-means: later passes may skip rows."
    work = 2 * len(x) * WIDTH * (WIDTH + AXES) + 2 * len(x) * AXES * CLUSTERS
    return work / gemm_rate(), f'{work / 1e9:.0f} billion operations at {gemm_rate() / 1e9:.0f} a nanosecond: covariance, axes, one pass over all centres'


def axes(n=20_000):
    "Features on their axes."
    x = features(n)
    return fit_pca(x, AXES, device='cpu').transform(x, device='cpu')


def our_clusters(rows):
    return rows, fit_kmeans(rows, CLUSTERS, max_iter=PASSES, device='cpu').labels_


def faiss_clusters(rows):
    "faiss's k-means on all rows, 20 passes, and the labels of its centres."
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    peer = faiss.Kmeans(AXES, CLUSTERS, niter=PASSES, seed=0, min_points_per_centroid=1, max_points_per_centroid=len(rows))
    peer.train(rows.numpy())
    return rows, peer.assign(rows.numpy())[1]


def clusters_no_worse(mine, other):
    "Our inertia is equal or lower."
    found, given = inertia(*mine), inertia(*other)
    assert found <= given, f'inertia {found:.6g}, the peer has {given:.6g}'


def clusters_floor(rows):
    "One full pass."
    work = 2 * len(rows) * AXES * CLUSTERS
    return work / gemm_rate(), f'{work / 1e9:.0f} billion operations at {gemm_rate() / 1e9:.0f} a nanosecond: one pass over all centres; {PASSES} passes without skipping take {PASSES} times that'


WORK = '{} x 2048 to 256 axes, 1000 clusters, 20 epochs, float32'
SKLEARN = 'scikit-learn IncrementalPCA and MiniBatchKMeans'
ROWS = [
    Row(row='PCA and k-means', work=WORK.format('20,000'), peer=SKLEARN, prepare=lambda: features(20_000), ours=ours, theirs=theirs, agree=no_worse, floor=floor,
        goal_time=1/5, pairs=2, requires='sklearn'),
    Row(row='k-means, beside faiss', work='20,000 x 256, 1000 clusters, at most 20 passes, float32', peer='faiss.Kmeans', prepare=axes, ours=our_clusters, theirs=faiss_clusters,
        agree=clusters_no_worse, floor=clusters_floor, goal_time=1., requires='faiss'),
    Row(row='PCA and k-means, large', work=WORK.format('100,000'), peer=SKLEARN, prepare=lambda: features(100_000), ours=ours, theirs=theirs, agree=no_worse, floor=floor,
        goal_time=1/5, pairs=1, full=True, requires='sklearn'),
    Row(row='k-means, beside faiss, large', work='100,000 x 256, 1000 clusters, at most 20 passes, float32', peer='faiss.Kmeans', prepare=lambda: axes(100_000), ours=our_clusters,
        theirs=faiss_clusters, agree=clusters_no_worse, floor=clusters_floor, goal_time=1., pairs=3, full=True, requires='faiss'),
]
