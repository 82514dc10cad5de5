"""Cluster scores against brute force, scikit-learn and each other, and saved predictions from a file to the last number."""
import itertools

import numpy as np
import pytest
import sklearn.metrics as reference
from conftest import ROOT, cells_of, python, source_of
from selfclass.core import load_json, save_arrays
from selfclass.errors import DataError, MissingInputError, MissingLabelsError, ParamsError
from selfclass.metrics import (accuracy, bootstrap_interval, class_accuracy, cluster_accuracy, cluster_scores, confusion, contingency, internal_scores,
                               majority_classes, match_clusters, overcluster_classes, read_predictions, run_clusters, run_stability, score_heads,
                               score_predictions, score_run, seed_stability, top_accuracy, transfer_scores, usage_scores, view_agreement)

SHAPES = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 6), (6, 3), (6, 6)]


def drawn(seed, clusters, classes, n=40, gap=1, outside=0.):
    "Clusters and classes that have something to do with each other; ids with gaps, some images in no cluster or of no class."
    gen = np.random.default_rng(seed)
    label = gen.integers(0, classes, n)
    pred = np.where(gen.random(n) < .5, label % clusters, gen.integers(0, clusters, n))
    pred, label = gap * pred, gap * label + 2
    pred[gen.random(n) < outside], label[gen.random(n) < outside] = -1, -1
    pred[0], label[0] = 0, 2
    return pred, label


def best_namings(pred, label):
    "Every naming that is one-to-one as far as clusters and classes reach, with its number of right images."
    clusters, classes = [np.unique(ids[ids >= 0]) for ids in (pred, label)]
    few, many = sorted((clusters, classes), key=len)
    for chosen in itertools.permutations(many, len(few)):
        pairs = zip(few, chosen) if few is clusters else zip(chosen, few)
        yield dict(pairs)


@pytest.mark.parametrize('clusters, classes', SHAPES)
@pytest.mark.parametrize('gap, outside', [(1, 0.), (7, 0.), (3, .2)])
def test_accuracies_are_those_of_brute_force(clusters, classes, gap, outside):
    for seed in range(4):
        pred, label = drawn(seed, clusters, classes, gap=gap, outside=outside)
        known = label >= 0
        right = {tuple(names.items()): sum(names.get(p, -2) == c for p, c in zip(pred[known], label[known])) for names in best_namings(pred[known], label)}
        scores = cluster_scores(pred, label)
        assert scores['acc'] == pytest.approx(max(right.values()) / known.sum())
        votes = [np.bincount(label[known & (pred == k)]).max() for k in np.unique(pred[known & (pred >= 0)])]
        assert scores['acc_many_to_one'] == pytest.approx(sum(votes) / known.sum())
        over = set()
        for names, count in right.items():
            if count == max(right.values()):
                left = [k for k in np.unique(pred[known & (pred >= 0)]) if k not in dict(names)]
                over.add(round((count + sum(np.bincount(label[known & (pred == k)]).max() for k in left)) / known.sum(), 9))
        assert round(scores['acc_over'], 9) in over
        assert scores['acc'] <= scores['acc_over'] <= scores['acc_many_to_one']


@pytest.mark.parametrize('clusters, classes', [*SHAPES, (30, 4), (4, 30)])
@pytest.mark.parametrize('outside', [0., .2])
def test_partition_scores_are_scikit_learns(clusters, classes, outside):
    for seed in range(3):
        pred, label = drawn(seed, clusters, classes, n=150, gap=2, outside=outside)
        scores, known = cluster_scores(pred, label), label >= 0
        for name, score in (('nmi', reference.normalized_mutual_info_score), ('ami', reference.adjusted_mutual_info_score), ('ari', reference.adjusted_rand_score)):
            assert scores[name] == pytest.approx(score(label[known], pred[known]), abs=1e-9), name      # images in no cluster are one group
        assert scores['n_unassigned'] == (pred[known] < 0).sum() and scores['n_uncovered'] == (~known).sum()


def test_every_view_of_the_names_tells_the_same():
    for seed, (clusters, classes) in itertools.product(range(3), SHAPES):
        pred, label = drawn(seed, clusters, classes, n=80, gap=3, outside=.15)
        scores, known = cluster_scores(pred, label), label >= 0
        for rule, name in ((match_clusters, 'acc'), (overcluster_classes, 'acc_over'), (majority_classes, 'acc_many_to_one')):
            assert accuracy(rule(pred, label), pred, label) == pytest.approx(scores[name])
        sizes = dict(zip(*np.unique(label[known], return_counts=True)))
        found = class_accuracy(pred, label)
        assert sum(found[f'acc_class/{c}'] * n for c, n in sizes.items()) / known.sum() == pytest.approx(scores['acc'])
        matrix, rows = confusion(pred, label), cluster_accuracy(pred, label)
        assert np.trace(matrix) / known.sum() == pytest.approx(scores['acc']) and (matrix.sum(1) == list(sizes.values())).all()
        assert (rows['accuracy'] * rows['size']).sum() / known.sum() == pytest.approx(scores['acc']) and rows['cluster'].min() >= 0
        assert usage_scores(pred)['n_clusters_used'] == len(np.unique(pred[pred >= 0]))


def test_top_k_is_the_slow_definition():
    gen = np.random.default_rng(0)
    for clusters, k in itertools.product((2, 7, 12), (1, 5)):
        probs, label = gen.random((60, clusters)).round(1) + 1e-9, gen.integers(-1, 4, 60)
        match = overcluster_classes(probs.argmax(1), label, clusters)
        slow = [label[i] in match[np.argsort(-probs[i], kind='stable')[:k]] for i in range(60) if label[i] >= 0]
        assert top_accuracy(match, probs, label, k) == pytest.approx(np.mean(slow))
        assert k > 1 or np.mean(slow) == pytest.approx(accuracy(match, probs.argmax(1), label))


def test_names_from_another_split():
    pred, label = drawn(0, 9, 4, n=400)
    half = np.arange(400) < 200
    scores = transfer_scores(pred[half], label[half], pred[~half], label[~half])
    names = overcluster_classes(pred[half], label[half], 9)
    assert scores['acc_tr'] == pytest.approx((names[pred[~half]] == label[~half]).mean()) and scores['acc_val'] == cluster_scores(pred[~half], label[~half])['acc_over']
    with pytest.raises(MissingLabelsError):
        transfer_scores(pred[half], np.full(200, -1), pred[~half], label[~half])


def test_agreement_and_stability():
    gen = np.random.default_rng(0)
    views = gen.integers(0, 5, (3, 500))
    views[1:] = np.where(gen.random((2, 500)) < .7, views[0], views[1:])
    pairs = list(itertools.combinations(views, 2))
    assert view_agreement(views)['agreement_kappa'] == pytest.approx(np.mean([reference.cohen_kappa_score(a, b) for a, b in pairs]))
    assert seed_stability(views)['stability_ari'] == pytest.approx(np.mean([reference.adjusted_rand_score(a, b) for a, b in pairs]))
    renamed = [gen.permutation(5)[view] for view in views]
    assert seed_stability(renamed) == pytest.approx(seed_stability(views)) and view_agreement(renamed)['agreement'] != view_agreement(views)['agreement']
    assert np.isnan(view_agreement([[1, 1], [1, 1]])['agreement_kappa'])


def test_interval_narrows_with_the_root_of_the_images():
    width = []
    for n in (200, 3200):
        ends = bootstrap_interval(*drawn(0, 4, 4, n=n), names=('acc', 'nmi', 'ari', 'ami'), repeats=300)
        width.append([ends[f'{name}_high'] - ends[f'{name}_low'] for name in ('acc', 'nmi', 'ari', 'ami')])
    assert ((2 < np.divide(*width)) & (np.divide(*width) < 8)).all()                  # four times is expected


def a_run(labels=True):
    gen = np.random.default_rng(0)
    run = {'classes': np.array([4, 4, 9]), 'head_loss': np.array([.3, .2, .1])}
    for split, n in (('train', 120), ('test', 80)):
        truth = gen.integers(0, 4, n)
        run |= {f'{split}_embeddings': np.eye(4)[truth] + .1 * gen.normal(size=(n, 4))} | ({f'{split}_labels': truth} if labels else {})
        run |= {f'{split}_probs_{h}': .8 * np.eye(size)[np.where(gen.random(n) < .8, truth, gen.integers(0, size, n))] + .2 / size for h, size in enumerate((4, 4, 9))}
    return run


def test_a_run_and_its_heads():
    run = a_run()
    scores, heads = score_run(run), score_heads(run)
    assert scores['best_head'] == 1 and heads['head1/acc'] == scores['acc'] and heads['head2/acc_over'] == scores['acc_over_9'] and heads['head2/head_loss'] == .1
    assert scores['acc_tr'] == transfer_scores(run['train_probs_1'].argmax(1), run['train_labels'], run['test_probs_1'].argmax(1), run['test_labels'])['acc_tr']
    assert scores['acc'] == scores['acc_over'] == scores['acc_val'] and 'acc_top5' not in scores      # four clusters
    blind = score_heads(a_run(labels=False))
    assert not any('acc' in name for name in blind) and blind['head0/confidence'] == heads['head0/confidence']


def test_a_run_has_intervals_and_what_its_views_say():
    run = a_run()
    scores, clusters, labels = score_run(run), run['test_probs_1'].argmax(1), run['test_labels']
    assert (run_clusters(run) == clusters).all() and (run_clusters(run, 'train') == run['train_probs_1'].argmax(1)).all()
    expected = bootstrap_interval(clusters, labels, ('acc', 'nmi', 'ari'))
    assert len(expected) == 6 and all(scores[name] == value for name, value in expected.items())
    assert all(scores[f'{name}_low'] < scores[name] < scores[f'{name}_high'] for name in ('acc', 'nmi', 'ari'))
    views = np.stack([clusters, np.where(np.arange(80) % 4, clusters, 3 - clusters)], axis=1)
    seen = score_run(run | {'test_views_1': views, 'test_views_0': 0 * views})              # those of the head that speaks
    assert seen['agreement'] == .75 and seen['agreement_kappa'] == pytest.approx(reference.cohen_kappa_score(*views.T)) and 'agreement' not in scores
    blind = score_run(a_run(labels=False) | {'test_views_1': views})
    assert blind['agreement'] == .75 and not any(name.startswith(('acc', 'nmi')) for name in blind)


def test_stability_of_each_run_and_of_all():
    gen = np.random.default_rng(0)
    first = gen.integers(0, 5, 400)
    runs = [first, np.where(gen.random(400) < .8, (first + 1) % 5, gen.integers(0, 5, 400)), gen.integers(0, 5, 400)]
    each, pairs = run_stability(runs), {(i, j): reference.adjusted_rand_score(runs[i], runs[j]) for i, j in itertools.combinations(range(3), 2)}
    for i, found in enumerate(each):
        mine = [value for pair, value in pairs.items() if i in pair]
        assert found == pytest.approx({'stability_ari': np.mean(mine), 'stability_ari_min': min(mine)})
    assert np.mean([found['stability_ari'] for found in each]) == pytest.approx(seed_stability(runs)['stability_ari'])
    assert min(found['stability_ari'] for found in each) == each[2]['stability_ari']         # the one that found something else


def test_cluster_stage_writes_runs_heads_and_stability(tmp_path):
    "Three seeds, of which two agree; labels, then none; one seed alone has no stability. Without torch."
    (tmp_path/'settings.ini').symlink_to(ROOT/'settings.ini')
    source = '\n'.join(source_of(cell) for cell in cells_of(ROOT/'nbs'/'pipeline'/'cluster.ipynb') if cell['cell_type'] == 'code')
    def stage(run, *seeds):
        for seed in seeds:
            changed = {'test_probs_1': np.roll(run['test_probs_1'], seed, axis=1) if seed < 2 else np.roll(run['test_probs_1'], 7, axis=0)}
            save_arrays(tmp_path/'out'/'embed'/'selfclassifier'/'shapes'/f'{seed}.npz', **run | changed)
        ran = python('-W', 'error', '-c', source.replace('seeds = [0]', f'seeds = {list(seeds)}') + '\nimport sys; print("torch" in sys.modules)', cwd=tmp_path)
        assert ran.returncode == 0 and ran.stdout.split()[-1] == 'False', ran.stderr
        return [load_json(tmp_path/'out'/'cluster'/'selfclassifier'/f'shapes{end}.json') for end in ('', '-heads')]
    scores, heads = stage(a_run(), 0, 1, 2)
    assert scores['0']['acc'] == scores['1']['acc'] == heads['1']['head1/acc'] and scores['0']['acc_low'] < scores['0']['acc'] < scores['0']['acc_high']
    assert {name.split('/')[0] for name in heads['0']} == {'head0', 'head1', 'head2'} and heads['0']['head2/n_clusters'] == 9
    assert {'usage_entropy', 'empty_clusters', 'confidence', 'margin', 'acc_tr', 'acc_val', 'acc_over_9', 'stability_ari'} <= set(scores['0'])
    assert scores['2']['stability_ari'] < scores['0']['stability_ari'] and scores['2']['stability_ari_min'] < .2 < scores['0']['stability_ari']
    blind, heads = stage(a_run(labels=False), 0, 1)
    assert blind['0']['stability_ari'] == 1 and 'acc' not in blind['0'] and 'head1/usage_entropy' in heads['0'] and 'head1/acc' not in heads['0']
    assert 'stability_ari' not in stage(a_run(), 0)[0]['0']


def test_saved_predictions_in_every_form(tmp_path):
    run = a_run()
    probs, label = run['test_probs_1'], run['test_labels']
    expected = score_predictions({'probs': probs, 'label': label})
    save_arrays(tmp_path/'a.npz', probs_0=probs, label=label, id=np.array([f'{i}.png' for i in range(80)]))
    header = ','.join(['id', *(f'p{k}' for k in range(4)), 'label'])
    lines = [f'"image, {i}",{",".join(f"{p:.9f}" for p in row)},{c}' for i, (row, c) in enumerate(zip(probs, label))]
    (tmp_path/'b.csv').write_text('\n'.join([header, *lines]) + '\n')
    for name in ('a.npz', 'b.csv'):
        assert score_predictions(tmp_path/name) == pytest.approx(expected, abs=1e-6)
    known = score_run(run)
    assert all(expected[name] == known[name] for name in ('acc', 'acc_many_to_one', 'acc_over', 'acc_val', 'nmi', 'ami', 'ari', 'usage_entropy', 'confidence', 'margin'))
    several = {f'probs_{h}': run[f'test_probs_{h}'] for h in range(3)} | {'label': label, 'head_loss': run['head_loss'], 'embeddings': run['test_embeddings']}
    several |= {f'train_probs_{h}': run[f'train_probs_{h}'] for h in range(3)} | {'train_label': run['train_labels']}
    scores = score_predictions(several)
    assert all(scores[name] == known[name] for name in ('best_head', 'acc', 'acc_tr', 'acc_over_9', 'silhouette', 'davies_bouldin'))
    assert scores['head2/acc_over'] == known['acc_over_9'] and scores['head0/acc_top5'] == 1.


@pytest.mark.parametrize('change, error, words', [
    ({'label': np.arange(7)}, DataError, ('pred and label', '[8, 7]')),
    ({'label': np.linspace(0, 1, 8)}, DataError, ('label should hold whole numbers', 'float64')),
    ({'pred': None, 'probs': np.full((8, 3), np.nan)}, DataError, ('probs should be finite', 'NaN')),
    ({'pred': None, 'probs': np.full((8, 3), 2.)}, DataError, ('apply the softmax',)),
    ({'pred': np.array([], int), 'label': np.array([], int)}, DataError, ('pred should hold one number per image', '(0,)')),
    ({'pred': np.full(8, -1)}, DataError, ('pred is -1 for every image',)),
    ({'label': np.full(8, -1)}, MissingLabelsError, ('label is -1 for every image',)),
    ({'id': np.zeros(8, int)}, DataError, ('id should name each image once', "'0'")),
    ({'prediction': np.zeros(8, int)}, DataError, ("'prediction'", "did you mean 'pred'")),
    ({'pred': None}, DataError, ('no pred and no probs',)),
    ({'classes': [2]}, ParamsError, ('n_clusters should be at least 4',)),
    ({'head_loss': [.1, .2]}, ParamsError, ('for each of the 1 heads',)),
])
def test_bad_predictions_are_named(change, error, words):
    saved = {'pred': np.arange(8) % 4, 'label': np.arange(8) % 4} | change
    with pytest.raises(error) as said:
        score_predictions({name: column for name, column in saved.items() if column is not None})
    assert '\n' not in str(said.value) and all(word in str(said.value) for word in words), said.value


def test_bad_files_are_named(tmp_path):
    for text, words in (('pred,label\n', 'holds no predictions'), ('', 'holds no predictions'), ('pred,label\n1,2.5\n', 'label should hold whole numbers'),
                        ('pred;label\n1;2\n', "'pred;label'"), ('p0,p1,label\n0.5,nan,1\n', 'probs should be finite'), ('pred,label\n1,2\n3\n', 'is not a table of predictions')):
        (tmp_path/'saved.csv').write_text(text)
        with pytest.raises(DataError) as said:
            score_predictions(tmp_path/'saved.csv')
        assert words in str(said.value) and '\n' not in str(said.value), said.value
    with pytest.raises(MissingInputError, match='not there'):
        read_predictions(tmp_path/'nowhere.npz')
    (tmp_path/'half.npz').write_bytes(b'PK')
    with pytest.raises(DataError, match='not a whole .npz'):
        read_predictions(tmp_path/'half.npz')


@pytest.mark.parametrize('call', [lambda: cluster_scores([0, 1], [0]), lambda: cluster_scores([0., 1.], [0, 1]), lambda: cluster_scores([], []), lambda: contingency([0, -2], [0, 1]),
                                  lambda: top_accuracy([0, 1], [[.5, np.nan]], [0]), lambda: internal_scores([[1.], [2.]], [[np.nan], [1.]]),
                                  lambda: view_agreement([[0, 1]]), lambda: seed_stability([[0, 1], [0]]), lambda: run_stability([[0, 1]]),
                                  lambda: score_run(a_run() | {'test_labels': np.linspace(0, 1, 80)}), lambda: score_run(a_run() | {'test_labels': np.zeros(79, int)}),
                                  lambda: score_run(a_run() | {'test_embeddings': np.zeros((0, 4)), 'test_probs_1': np.zeros((0, 4))}),
                                  lambda: score_run(a_run() | {'test_probs_1': np.full((80, 4), np.nan)}), lambda: score_run(a_run() | {'test_views_1': np.full((80, 2), .5)}), lambda: score_heads({'classes': [3]})])
def test_bad_arrays_are_data_errors(call):
    with pytest.raises(DataError):
        call()


def test_scores_start_without_torch():
    ran = python('-W', 'error', '-c', 'import sys, selfclass.hierarchy as h; h.superclasses(2); print("torch" in sys.modules)')
    assert ran.stdout.strip() == 'False', ran.stderr
