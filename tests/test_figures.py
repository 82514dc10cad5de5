"""The figures of the papers: what no single cell of the notebook can see (other processes, other threads, ImageNet's size, every bad input)."""
import numpy as np
import pytest
from conftest import python
from matplotlib.figure import Figure

from selfclass import figures as f
from selfclass.core import save_arrays, save_json
from selfclass.errors import DataError, MissingInputError, MissingLabelsError, ParamsError
from selfclass.taxonomy import superclasses
from selfclass.metrics import cluster_scores
from selfclass.report import alt_text, save_figure

N, K = 120, 4
RNG = np.random.default_rng(0)
PROBS = RNG.dirichlet(np.full(K, .3), N)
IDS = PROBS.argmax(1)
LABELS = RNG.integers(0, 3, N)
PIXELS = RNG.integers(0, 255, (N, 3, 8, 8), dtype=np.uint8)
FEATURES = RNG.standard_normal((N, 6)) + 5 * np.eye(K, 6)[IDS]
HISTORY = RNG.integers(0, K, (5, 2, N)).astype(np.uint16)
EPOCHS = np.arange(1, 6)
MATRIX = np.arange(9).reshape(3, 3)


def one_of_each():
    "Every figure of the module, small."
    curves = {0: f.pseudolabel_curves(HISTORY, EPOCHS, LABELS, head=1)}
    entropies = f.entropy_over_epochs(HISTORY, EPOCHS, LABELS)
    return {
        'prototypes': f.prototype_grid(PIXELS, f.prototype_images(FEATURES, PROBS)),
        'margins': f.confidence_grid(PIXELS, PROBS),
        'blocks': f.block_confusion(MATRIX, [0, 1, 0]),
        'pseudolabels': f.pseudolabel_figure(curves),
        'entropy': f.entropy_figure(EPOCHS, entropies, LABELS),
        'filters': f.filter_grid(RNG.standard_normal((8, 3, 3, 3))),
        'sweep': f.sweep_figure({'k': [{'k': k, 'acc': k / 9} for k in (1, 2, 8)]}, ['acc']),
        'confidence': f.confidence_figure(PROBS, LABELS),
        'map': f.projection_figure(f.project(FEATURES, method='pca').points, IDS, LABELS),
    }


def test_starts_and_draws_without_torch_network_or_display():
    code = ('import sys, socket; socket.socket.connect = None\n'
            'import numpy as np, selfclass.figures as f\n'
            'f.prototype_grid(np.zeros((2, 3, 4, 4), np.uint8), [0, 1]); f.project(np.eye(60))\n'
            'print("torch" in sys.modules, "matplotlib.backends.backend_agg" in sys.modules)')
    ran = python('-W', 'error', '-c', code, MPLBACKEND='agg')
    assert ran.returncode == 0 and ran.stdout.split()[0] == 'False', ran.stderr


def test_every_figure_has_alt_text_with_a_number_and_stays_closed():
    import matplotlib.pyplot as plt
    plt.close('all')                        # whatever other tests left
    for name, figure in one_of_each().items():
        assert isinstance(figure, Figure) and any(sign.isdigit() for sign in alt_text(figure)) and alt_text(figure).endswith('.'), name
        assert 'nan' not in alt_text(figure), name
    assert plt.get_fignums() == []


def test_groups_and_lines_differ_without_colour():
    "Markers tell the first ten groups apart, dashes the lines of a sweep."
    assert len({look['marker'] for look in f._looks(10)}) == 10
    figure = f.sweep_figure({'k': [{'k': k, 'a': k, 'b': 2 * k, 'c': 3 * k} for k in (1, 2)]}, 'abc')
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() != 'None']
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 3


def test_same_bytes_in_another_process_with_other_threads(tmp_path):
    code = ('import sys, numpy as np, selfclass.figures as f\nfrom selfclass.report import save_figure\n'
            'x = np.random.default_rng(0).standard_normal((90, 20)); plane = f.project(x, sample=80)\n'
            'np.save(sys.argv[1] + ".npy", plane.points); save_figure(f.projection_figure(plane.points, plane.index % 7, plane.index % 3), sys.argv[1])')
    for name, threads in (('one', '1'), ('two', '2')):
        ran = python('-W', 'error', '-c', code, tmp_path/name, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
        assert ran.returncode == 0, ran.stderr
    for end in ('.npy', '.svg', '.png'):
        assert (tmp_path/f'one{end}').read_bytes() == (tmp_path/f'two{end}').read_bytes(), end


@pytest.mark.parametrize('argument, error, call', [
    ('probs', DataError, lambda: f.surest_images(PROBS * 3)),
    ('probs', DataError, lambda: f.margin_images(PROBS[0])),
    ('n', ParamsError, lambda: f.margin_images(PROBS, 2.5)),
    ('n', ParamsError, lambda: f.confidence_grid(PIXELS, PROBS, n=0)),
    ('embeddings', DataError, lambda: f.prototype_images(FEATURES[1:], PROBS)),
    ('embeddings', DataError, lambda: f.prototype_images(np.full((N, 2), np.nan), PROBS)),
    ('pixels', DataError, lambda: f.prototype_grid(PIXELS[:, :2], [0])),
    ('index', DataError, lambda: f.prototype_grid(PIXELS, [N])),
    ('index', DataError, lambda: f.prototype_grid(PIXELS, [.5])),
    ('names', DataError, lambda: f.prototype_grid(PIXELS, [0, 1], ['a'])),
    ('which', ParamsError, lambda: f.confidence_grid(PIXELS, PROBS, which=[K])),
    ('which', DataError, lambda: f.confidence_grid(PIXELS, PROBS, which=[])),
    ('matrix', DataError, lambda: f.block_shares(MATRIX / 2, [0, 0, 0])),
    ('matrix', DataError, lambda: f.block_confusion(-MATRIX, [0, 0, 0])),
    ('superclass', DataError, lambda: f.block_confusion(MATRIX, [0, .5, 1])),
    ('superclass', DataError, lambda: f.block_confusion(MATRIX, [0, 1])),
    ('class_names', DataError, lambda: f.block_confusion(MATRIX, [0, 0, 1], ['a'])),
    ('superclass_names', DataError, lambda: f.block_confusion(MATRIX, [0, 0, 1], superclass_names=['a'])),
    ('order', ParamsError, lambda: f.block_confusion(MATRIX, [0, 0, 1], order=[3])),
    ('order', DataError, lambda: f.block_confusion(MATRIX, [0, 0, 1], order=[])),
    ('predictions', DataError, lambda: f.pseudolabel_curves(HISTORY[0], EPOCHS)),
    ('predictions', DataError, lambda: f.pseudolabel_curves(HISTORY[:, :, :0], EPOCHS)),
    ('head', ParamsError, lambda: f.pseudolabel_curves(HISTORY, EPOCHS, head=2)),
    ('n_clusters', ParamsError, lambda: f.pseudolabel_curves(HISTORY, EPOCHS, n_clusters=2)),
    ('labels', DataError, lambda: f.pseudolabel_curves(HISTORY, EPOCHS, LABELS[1:])),
    ('labels', DataError, lambda: f.pseudolabel_curves(HISTORY, EPOCHS, LABELS / 2)),
    ('labels', MissingLabelsError, lambda: f.pseudolabel_curves(HISTORY, EPOCHS, np.full(N, -1))),
    ('pseudolabels', DataError, lambda: f.pseudolabel_curves(HISTORY, EPOCHS, pseudolabels=HISTORY)),
    ('curves', DataError, lambda: f.pseudolabel_figure({})),
    ('curves', DataError, lambda: f.pseudolabel_figure({0: {'epoch': [1]}})),
    ('labels', MissingLabelsError, lambda: f.entropy_over_epochs(HISTORY, EPOCHS, None)),
    ('clusters', DataError, lambda: f.cluster_entropies(PROBS, LABELS)),
    ('n_clusters', ParamsError, lambda: f.cluster_entropies(IDS, LABELS, 2)),
    ('entropies', DataError, lambda: f.entropy_figure(EPOCHS, np.full((5, 2), np.nan), LABELS)),
    ('weights', DataError, lambda: f.filter_grid(np.ones((4, 2, 3, 3)))),
    ('weights', DataError, lambda: f.filter_grid(np.ones((4, 3, 3, 3), int))),
    ('most', ParamsError, lambda: f.filter_grid(np.ones((4, 3, 3, 3)), most=0)),
    ('sweeps', DataError, lambda: f.sweep_figure({})),
    ('sweeps', ParamsError, lambda: f.sweep_figure({'k': [{'k': 1, 'acc': .5}]}, ['nmi'])),
    ('sweeps', DataError, lambda: f.sweep_figure({'k': [{'k': 1, 'acc': float('nan')}]}, ['acc'])),
    ('match', DataError, lambda: f.reliability(PROBS, LABELS, [0])),
    ('bins', ParamsError, lambda: f.reliability(PROBS, LABELS, bins=0)),
    ('labels', MissingLabelsError, lambda: f.coverage_curve(PROBS, None)),
    ('probs', DataError, lambda: f.confidence_figure(np.full((N, 2), np.nan), LABELS)),
    ('features', DataError, lambda: f.project(np.full((9, 2), np.inf))),
    ('method', ParamsError, lambda: f.project(FEATURES, method='tsen')),
    ('sample', ParamsError, lambda: f.project(FEATURES, sample=0)),
    ('points', DataError, lambda: f.projection_figure(FEATURES, IDS)),
    ('clusters', DataError, lambda: f.projection_figure(FEATURES[:, :2], IDS[1:])),
    ('labels', DataError, lambda: f.projection_figure(FEATURES[:, :2], IDS, LABELS[1:])),
    ('cluster_names', DataError, lambda: f.projection_figure(FEATURES[:, :2], IDS, cluster_names=['a'])),
])
def test_bad_input_names_the_argument(argument, error, call):
    with pytest.raises(error) as found:
        call()
    assert argument in str(found.value) and '\n' not in str(found.value)


def test_one_cluster_one_image_one_class():
    one = np.ones((1, 1))
    f.confidence_grid(PIXELS[:1], one), f.confidence_figure(one, [0]), f.prototype_grid(PIXELS, f.prototype_images(one, one))
    f.projection_figure(f.project(one).points, [0], [0]), f.block_confusion(np.array([[0]]), [0]), f.block_confusion(np.array([[1, 2]]), [-1])
    record = np.zeros((1, 1, 1), int)
    f.pseudolabel_figure({0: f.pseudolabel_curves(record, [1], [0])}), f.entropy_figure([1], f.entropy_over_epochs(record, [1], [0]), [0])


def test_empty_clusters_and_unknown_labels():
    probs = np.pad(PROBS, ((0, 0), (0, 3)))                                     # clusters 4, 5, 6 hold nothing
    assert [len(images) for images in f.surest_images(probs)[K:]] == [0, 0, 0]
    assert (f.prototype_images(FEATURES, probs)[K:] == -1).all()
    assert np.isnan(f.cluster_entropies(IDS, LABELS, 7)[K:]).all()
    some = np.where(np.arange(N) % 2, LABELS, -1)
    assert np.isclose(f.pseudolabel_curves(HISTORY, EPOCHS, some)['nmi'][0], cluster_scores(HISTORY[0, 0], some)['nmi'])
    kept = some >= 0
    for name, values in f.reliability(probs, some).items():
        np.testing.assert_allclose(values, f.reliability(probs[kept], some[kept])[name], err_msg=name)
    f.confidence_figure(probs, some), f.projection_figure(FEATURES[:, :2], np.where(kept, IDS, -1), some), f.projection_figure(FEATURES[:, :2], IDS, np.full(N, -1))
    f.confidence_grid(PIXELS, probs, which=[6, 0])


def test_imagenet_sized(tmp_path):
    "50,000 images, 1,000 classes: everything draws, and what is written stays light."
    rng = np.random.default_rng(1)
    n, k = 50_000, 1000
    labels = rng.integers(0, k, n)
    ids = np.where(rng.random(n) < .5, labels, rng.integers(0, k, n))
    probs = np.full((n, k), .3 / k, np.float32)
    probs[np.arange(n), ids] += .7
    matrix = np.zeros((k, k + 1), int)
    np.add.at(matrix, (labels, ids), 1)
    history = np.stack([rng.permutation(ids), ids])[:, None]
    embeddings = rng.standard_normal((n, 8), dtype=np.float32)
    thumbs = rng.integers(0, 255, (n, 3, 4, 4), dtype=np.uint8)
    drawn = {
        'prototypes': f.prototype_grid(thumbs, f.prototype_images(embeddings, probs)), 'margins': f.confidence_grid(thumbs, probs),
        'blocks': f.block_confusion(matrix, np.arange(k) // 37), 'zoom': f.block_confusion(matrix, np.arange(k) // 37, order=range(100, 300)),
        'pseudolabels': f.pseudolabel_figure({0: f.pseudolabel_curves(history, [1, 2], labels)}),
        'entropy': f.entropy_figure([1, 2], f.entropy_over_epochs(history, [1, 2], labels), labels),
        'confidence': f.confidence_figure(probs, labels), 'map': f.projection_figure(embeddings[:, :2], ids, labels),
    }
    for name, figure in drawn.items():
        svg, png = save_figure(figure, tmp_path/name)
        assert svg.stat().st_size < 1_500_000 and png.stat().st_size < 400_000, name
    assert f.project(embeddings, sample=200).points.shape == (200, 2)


def test_blocks_of_a_joined_matrix_keep_every_image():
    rng = np.random.default_rng(2)
    matrix = rng.integers(0, 5, (300, 301))
    superclass = rng.integers(-1, 9, 300)
    order = f._class_order(None, superclass)
    starts, together = f._joined(superclass[order])
    share = f._shown_shares(matrix, order, starts)
    assert together == 3 and len(share) == len(starts) < 130
    np.testing.assert_allclose(share.sum(1), 1)
    sizes = np.add.reduceat(matrix[order].sum(1), starts)
    inside = sum(share[i, j] * sizes[i] for i in range(len(starts)) for j in range(len(starts))
                 if superclass[order][starts][i] == superclass[order][starts][j] >= 0)
    told = f.block_shares(matrix, superclass)
    diagonal_of_none = np.diag(matrix)[superclass < 0].sum() / matrix.sum()
    assert np.isclose(inside / matrix.sum(), told['right'] + told['inside'] - diagonal_of_none)


@pytest.mark.parametrize('level, frames', [('cifar100-20', 20), (2, 10), ('living17', 17)])
def test_blocks_of_the_published_hierarchies(level, frames):
    tree = superclasses(level)
    n = len(tree.assignment)
    near = np.argsort(np.where(tree.assignment < 0, frames, tree.assignment), kind='stable')
    matrix = np.zeros((n, n + 1), int)
    np.fill_diagonal(matrix, 6)
    matrix[near, np.roll(near, 1)] += 4                                          # taken for the neighbour in the order
    figure = f.block_confusion(matrix, tree.assignment, tree.leaf_names, tree.names)
    assert len(figure.axes[0].patches) == frames and f'{n} classes ordered by {frames} superclasses: 60.0%' in alt_text(figure)
    assert f.block_shares(matrix, tree.assignment)['inside_by_chance'] < .1
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts and all(any(text.rstrip('…') in name for name in tree.names) for text in texts)


def leave_run(out, heads):
    "Folders of a run whose seeds speak through different heads."
    for seed, head in heads.items():
        arrays = {'classes': np.array([K, K]), 'head_loss': np.array([.5, .6]), 'test_embeddings': FEATURES, 'test_labels': LABELS, 'train_labels': LABELS}
        save_arrays(out/'embed'/'m'/'d'/f'{seed}.npz', **arrays, **{f'test_probs_{h}': PROBS.astype(np.float32) for h in (0, 1)})
        save_arrays(out/'pretrain'/'m'/f'd-{seed}'/'predictions.npz', epoch=EPOCHS, classes=np.array([K, K]), train=HISTORY, test=HISTORY)
    save_arrays(out/'embed'/'m'/'d'/'thumbnails.npz', pixels=PIXELS, index=np.arange(N))
    save_json({str(seed): {'best_head': head, 'acc': .1 * seed} for seed, head in heads.items()}, out/'cluster'/'m'/'d.json')
    return out


def test_figures_of_a_run(tmp_path):
    inputs = f.run_inputs(leave_run(tmp_path, {0: 1, 1: 0, 2: 1}), 'm', 'd', [0, 1, 2, 3])
    assert (inputs['shown'], inputs['head'], sorted(inputs['history'])) == (1, 0, [0, 1, 2])
    assert [name for name, _ in f.paper_figures(inputs)] == ['prototypes', 'confidence-images', 'pseudolabels', 'entropy', 'confidence', 'map']
    saved, _ = f._history_of(inputs)
    assert {seed: head for seed, (_, _, head, _) in saved.items()} == {0: 1, 1: 0, 2: 1}          # each seed its own head
    assert [name for name, _ in f.paper_figures(inputs | {'superclass': [0, 0, 1]})][2] == 'blocks'
    assert f.run_inputs(tmp_path, 'm', 'd', [0, 1, 2], shown=2)['head'] == 1


def test_a_run_gives_up_only_what_is_missing(tmp_path):
    with pytest.raises(MissingInputError, match='holds nothing of m on d.*dvc repro'):
        f.run_inputs(tmp_path, 'm', 'd', [0])
    assert f.paper_figures({}) == []
    out = leave_run(tmp_path, {0: 0})
    (out/'embed'/'m'/'d'/'thumbnails.npz').unlink()
    assert [name for name, _ in f.paper_figures(f.run_inputs(out, 'm', 'd', [0]))] == ['pseudolabels', 'entropy', 'confidence', 'map']
    (out/'embed'/'m'/'d'/'0.npz').unlink()
    assert [name for name, _ in f.paper_figures(f.run_inputs(out, 'm', 'd', [0]))] == ['pseudolabels']
    (out/'cluster'/'m'/'d.json').unlink()
    assert f.run_inputs(leave_run(tmp_path/'other', {0: 1}), 'm', 'd', [5]).get('head') is None


def test_filters_of_a_saved_network(tmp_path):
    import torch

    from selfclass.hub import save_pretrained
    from selfclass.model import ClusterNet
    net = ClusterNet(backbone='convnet', width=4, hidden=None, dim=4, classes=(3,))
    save_pretrained(net, tmp_path/'pretrain'/'m'/'d-0')
    found = f.run_inputs(tmp_path, 'm', 'd', [0])
    first = next(weight for weight in net.backbone.parameters() if weight.ndim == 4)
    torch.testing.assert_close(torch.from_numpy(found['filters']), first.detach())
    assert [name for name, _ in f.paper_figures(found)] == ['filters']
