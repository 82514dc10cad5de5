"""Exact nearest neighbours of a batch in a queue: against the full matrix of scores and against faiss."""
import torch

from benchmarks.harness import Row, gemm_rate, seconds_of
from selfclass.search import _screen_types, top_k

QUERIES, KEYS, DIM = 4096, 262_144, 128


def embeddings(n_queries=QUERIES, n_keys=KEYS, dim=DIM, device='cpu', seed=0, clusters=2000):
    "Queries and keys: unit vectors around common centres (cosine of two of one cluster about 0.67), as a network in training gives them; seeded."
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dim, generator=g)
    both = centres[torch.randint(clusters, (n_queries + n_keys,), generator=g)] + .7 * torch.randn(n_queries + n_keys, dim, generator=g)
    return torch.nn.functional.normalize(both, dim=1).to(device).split([n_queries, n_keys])


def full_matrix(state, k=2):
    "The official algorithm: all scores, then the best of each row."
    queries, keys = state
    return (queries @ keys.T).topk(k)


def faiss_search(state, k):
    "faiss's exact index; it holds the keys already."
    queries, _, index = state
    return [torch.from_numpy(found) for found in index.search(queries.numpy(), k)]


def with_index():
    "The same vectors, and faiss's index of the keys on as many threads as torch has."
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    queries, keys = embeddings()
    index = faiss.IndexFlatIP(DIM)
    index.add(keys.numpy())
    return queries, keys, index


def agree(ours, theirs):
    "The same keys, but for scores closer than float32 can tell apart."
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-6)
    other = ours[1] != theirs[1]
    assert other.float().mean() < 1e-3, f'{other.float().mean():.1e} of the neighbours differ'


def fits_half(device='cpu'):
    "Are there matrix units for bfloat16?"
    return torch.bfloat16 in _screen_types(torch.device(device))


def floor(state):
    "The product alone, at the rate of the type that screens."
    queries, keys = state[:2]
    work, kind = 2 * len(queries) * keys.numel(), torch.bfloat16 if fits_half(keys.device.type) else torch.float32
    rate = gemm_rate(kind, keys.device.type)
    return work / rate, f'{work / 1e9:.0f} billion operations at {rate / 1e9:.0f} a nanosecond in {str(kind)[6:]}'


def search_seconds(n_queries: int, n_keys: int, dim: int, repeats: int = 5) -> float:
    "Seconds of a search for the two nearest of n_keys keys for n_queries queries, best of a few."
    queries, keys = embeddings(n_queries, n_keys, dim)
    return min(seconds_of(lambda: top_k(queries, keys, 2)) for _ in range(repeats + 1))


WORK = '4096 queries, 262,144 keys, 128 numbers, float32, k = {}'
FULL = 'official algorithm: all scores in memory, then torch.topk; written from the paper'
ROWS = [
    Row(row='neighbour search', work=WORK.format(2), peer=FULL, prepare=embeddings, ours=lambda state: top_k(*state, 2), theirs=full_matrix, agree=agree, floor=floor,
        goal_time=.5 if fits_half() else 1., goal_memory=1/8, pairs=5),
    Row(row='neighbour search, beside faiss', work=WORK.format(2), peer='faiss IndexFlatIP', prepare=with_index, ours=lambda state: top_k(*state[:2], 2),
        theirs=lambda state: faiss_search(state, 2), agree=agree, floor=floor, goal_time=1., requires='faiss'),
    Row(row='neighbour search, 20 of each', work=WORK.format(20), peer='faiss IndexFlatIP', prepare=with_index, ours=lambda state: top_k(*state[:2], 20),
        theirs=lambda state: faiss_search(state, 20), agree=agree, floor=floor, goal_time=1., requires='faiss'),
    Row(row='neighbour search, GPU', work=WORK.format(2), peer=FULL, prepare=lambda: embeddings(device='cuda'), ours=lambda state: top_k(*state, 2), theirs=full_matrix, agree=agree,
        floor=floor, goal_time=.5, goal_memory=1/8, device='cuda'),
]
