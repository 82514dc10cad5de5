"""The package's hierarchies are those of the papers, and give the papers' tables for predictions of ImageNet's size."""
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, python
from selfclass.errors import DataError, MissingLabelsError, ParamsError
from selfclass.hierarchy import IMAGENET_LEVELS, hierarchy_scores, score_tables, superclass_scores
from selfclass.taxonomy import Superclasses, levels, superclasses
from selfclass.metrics import cluster_scores

# level -> superclasses, leaves below them (Self-Classifier app. D and E, Table 2), and a hash of the names as the appendix prints them
APPENDIX = {
    'level2': (10, 890, 'e69ddf60a87233f3'),
    'level3': (29, 890, 'bc4c999ff34f9de3'),
    'level4': (128, 890, '61c5e29000c34251'),
    'level5': (466, 887, 'a3e0ffc73e028e61'),
    'level6': (591, 616, '61cf4310909be571'),
    'entity13': (13, 771, 'a952dca21857e316'),
    'entity30': (30, 639, 'b7f19868097ab6cc'),
    'living17': (17, 223, '774d6b5b5d4e3fe6'),
    'nonliving26': (26, 157, '3f1a387f3b840c88'),
}
# letters in which the appendix, as it was converted from PDF, differs from the class names
MISPRINTS = {'warhog': 'warthog', 'foulmart, founmart': 'foulmart, foumart', 'timepiece, timekeeper; horologe': 'timepiece, timekeeper, horologe',
             'Alligator mississippiensis': 'Alligator mississipiensis', 'scarabaeid beetle, scarabaeid, scarabaeid': 'scarabaeid beetle, scarabaeid, scarabaean',
             'coho, coho, coho salmon': 'coho, cohoe, coho salmon'}

FACTS = Path(os.environ.get('SELFCLASS_FACTS', ROOT.parent/'shared'/'facts'))


def fingerprint(names):
    "Hash of a set of names, by their letters and digits alone."
    return hashlib.sha256('\n'.join(sorted(re.sub('[^a-z0-9]', '', name.lower()) for name in names)).encode()).hexdigest()[:16]


def papers():
    "Folder with the texts of the papers; they do not belong to the repository."
    places = [Path(os.environ.get('SELFCLASS_PAPERS', ROOT/'papers')), ROOT.parent/'shared'/'papers']
    return next((place for place in places if list(place.glob('000_*.txt'))), None)


@pytest.mark.parametrize('level', APPENDIX)
def test_names_and_counts(level):
    count, leaves, names = APPENDIX[level]
    tree = superclasses(level)
    assert len(tree.names) == count and (tree.assignment >= 0).sum() == leaves and fingerprint(tree.names) == names
    assert tree.assignment.dtype == np.int64 and len(tree.assignment) == len(tree.leaf_names) == 1000 and len(tree.ids) == count


@pytest.mark.skipif(papers() is None, reason='the texts of the papers are not here; SELFCLASS_PAPERS names their folder')
@pytest.mark.parametrize('level', APPENDIX)
def test_names_are_those_of_the_appendix(level):
    text = next(papers().glob('000_*.txt')).read_text(encoding='utf-8').replace('*', '')
    for printed, meant in MISPRINTS.items():
        text = text.replace(printed, meant)
    start = re.search(rf'\n\d\. {level.replace("level", "Level ")} contains (\d+) superclasses - ', text, re.I)
    names = re.split(r'\n\d\. |\nwhere, |\n## ', text[start.end():])[0].split(';')
    assert int(start[1]) == len(names) == APPENDIX[level][0]
    assert fingerprint(names) == APPENDIX[level][2]


def test_levels_are_one_tree_and_breeds_hang_in_it():
    for name in IMAGENET_LEVELS[5:]:
        tree, level = superclasses(name), superclasses({'entity13': 3, 'entity30': 4}.get(name, 5))
        for node, called in zip(tree.ids, tree.names):
            assert level.names[level.ids.index(node)] == called
            assert ((level.assignment == level.ids.index(node)) == (tree.assignment == tree.ids.index(node))).all()
    for above, below in zip(IMAGENET_LEVELS[:4], IMAGENET_LEVELS[1:5]):
        pairs = set(zip(superclasses(below).assignment.tolist(), superclasses(above).assignment.tolist()))
        assert len({child for child, _ in pairs if child >= 0}) == len([pair for pair in pairs if pair[0] >= 0])


def test_a_returned_assignment_is_the_callers_own():
    superclasses(2).assignment[:] = 7
    assert superclasses(2).assignment.max() == 9 and superclasses(2).assignment[0] == 4


@pytest.mark.parametrize('wrong, meant', [('entity12', 'entity13'), ('living-17', 'living17'), ('cifar100_20', 'cifar100-20'), (7, 'level'), (None, 'known: level2'), ('Entity13', 'entity13')])
def test_unknown_level_names_the_nearest(wrong, meant):
    with pytest.raises(ParamsError) as said:
        superclasses(wrong)
    assert meant in str(said.value) and repr(wrong) in str(said.value) and '\n' not in str(said.value)
    with pytest.raises(ParamsError):
        superclass_scores([0, 1], [0, 1], wrong)


@pytest.mark.parametrize('pred, label, error, words', [
    ([0, 1], [0], DataError, 'one entry per image'), ([0, 1], [0., 1.], DataError, 'whole numbers'), ([], [], DataError, 'one number per image'),
    ([0, 1], None, MissingLabelsError, 'label is None'), ([0, 1], [0, 1000], DataError, 'the class 1000'), ([0, 1], [-1, -1], MissingLabelsError, '-1 for every'),
    ([-1, -1], [0, 1], DataError, 'pred is -1 for every image'), ([0, 1], [0, 0], DataError, 'no image is left'),
])
def test_bad_labels(pred, label, error, words):
    with pytest.raises(error, match=words):
        superclass_scores(pred, label, 'nonliving26' if words == 'no image is left' else 'level2')


def imagenet_sized(seed=0):
    "50,000 images: 40 % in the cluster of their class, 30 % in that of a sibling, the rest anywhere; clusters are numbered at random."
    gen, tree = np.random.default_rng(seed), superclasses(4).assignment
    label = np.repeat(np.arange(1000), 50)
    siblings = [np.flatnonzero(tree == tree[leaf]) for leaf in range(1000)]
    kin = np.concatenate([gen.choice(group, 50) for group in siblings])
    chance = gen.random(50_000)
    leaf = np.select([chance < .4, chance < .7], [label, kin], gen.integers(0, 1000, 50_000))
    return gen.permutation(1000)[leaf], label


def test_tables_1_to_3_from_a_file(tmp_path):
    pred, label = imagenet_sized()
    np.savetxt(tmp_path/'saved.csv', np.c_[pred, label], '%d', ',', header='pred,label', comments='')
    scores = score_tables(tmp_path/'saved.csv')
    wanted = [f'{prefix}{name}' for prefix in ('', *(f'{level}/' for level in IMAGENET_LEVELS)) for name in ('acc', 'nmi', 'ami', 'ari')]
    assert all(0 < scores[name] < 1 for name in wanted) and all(isinstance(value, (int, float)) for value in scores.values())
    assert scores['level2/acc'] > scores['level3/acc'] > scores['level4/acc'] > scores['level5/acc'] > scores['acc']
    assert scores['level2/nmi'] == scores['level3/nmi'] == scores['level4/nmi'] != scores['level5/nmi']          # leaves of one subset
    assert [scores[f'level{k}/n_scored'] for k in (2, 3, 4, 5, 6)] == [44500, 44500, 44500, 44350, 30800]
    assert [scores[f'{name}/n_scored'] for name in IMAGENET_LEVELS[5:]] == [38550, 31950, 11150, 7850]
    names = np.argmax([np.bincount(label[pred == k], minlength=1000) for k in range(1000)], axis=1)       # so clear that the majority is one-to-one
    assert len(set(names)) == 1000 and scores['acc'] == pytest.approx((names[pred] == label).mean())
    two = superclasses(2).assignment
    kept = two[label] >= 0
    assert scores['level2/acc_remapped'] == pytest.approx((two[names[pred]] == two[label])[kept].mean())
    assert scores['level2/acc'] >= scores['level2/acc_remapped']          # clusters of the 110 classes outside get a name inside
    probs = np.full((50_000, 1000), .0005, np.float32)
    probs[np.arange(50_000), pred] += .5
    np.savez(tmp_path/'saved.npz', probs=probs, label=label)
    soft = score_tables(tmp_path/'saved.npz', levels=['living17'])
    assert soft['living17/acc'] == scores['living17/acc'] and soft['acc'] == scores['acc'] <= soft['acc_top5']


def test_a_hierarchy_of_ones_own():
    mine = Superclasses(('even', 'odd'), np.arange(10) % 2, level='parity')
    digits = np.repeat(np.arange(10), 5)
    pred = (digits + 2) % 10                                              # every image in the cluster of a digit of the same parity
    scores = hierarchy_scores(pred, digits, [mine, mine._replace(assignment=np.arange(10) % 2 * 2 - 1, level='odd')])
    assert scores['parity/acc'] == 1 and scores['odd/n_scored'] == 25 and scores['parity/acc_superclass'] == .2
    assert hierarchy_scores(digits // 5, digits, [mine._replace(assignment=np.arange(10) // 5)])['parity/acc_superclass'] == 1
    with pytest.raises(ParamsError, match='a name each'):
        hierarchy_scores(pred, digits, [mine, mine])


def test_subsets_rename_classes_for_the_plain_scores():
    fifty = superclasses('imagenet-50')
    label = np.repeat(np.arange(1000), 2)
    scores = cluster_scores(label, fifty.assignment[label])
    assert scores['n_classes'] == 50 and scores['acc'] == 1 and scores['n_uncovered'] == 1900
    assert fifty.ids == tuple(sorted(fifty.ids))


@pytest.mark.skipif(not FACTS.exists(), reason='the collected facts lie beside the repository of the authors only; SELFCLASS_FACTS names their folder')
def test_package_data_are_the_collected_facts():
    facts = json.loads((FACTS/'superclasses.json').read_text())
    for name, entry in [(f'level{k}', e) for k, e in facts['levels'].items()] + list(facts['breeds'].items()):
        assert superclasses(name).assignment.tolist() == entry.get('assignment_all_leaves', entry['assignment']) and list(superclasses(name).names) == entry['names']


def test_package_data_ship_and_are_small():
    assert (ROOT/'selfclass'/'hierarchies.json.gz').stat().st_size < 60_000
    ran = python('-c', 'import setuptools, sys; sys.argv = ["setup.py", "--name"]; setuptools.setup = lambda **k: print(*k["package_data"]["selfclass"])\nexec(open("setup.py").read())')
    assert {'*.json', '*.json.gz'} <= set(ran.stdout.split()), ran.stderr
    assert len(levels()) == 20 and all(superclasses(name).source for name in levels())
