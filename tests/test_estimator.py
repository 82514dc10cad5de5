"""SelfClassifier keeps the rules of scikit-learn, takes pictures in every form, and finds the digits."""
import json
import os
import pickle
import random
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator

import selfclass
from selfclass import estimator
from selfclass.data import load_images
from selfclass.errors import DataError, MissingInputError, ParamsError, TrainingError
from selfclass.estimator import ClusterCount, SelfClassifier, UnreadablePictureWarning, estimate_n_clusters

SMALL = dict(backbone=dict(backbone='convnet', width=4, hidden=None, dim=16, classes=[3, 3, 5]), epochs=2, batch_size=16, device='cpu', verbose=0, random_state=0)


@pytest.fixture(scope='module')
def digits():
    return load_digits()


@pytest.fixture(scope='module')
def shapes():
    return load_images('shapes')


@pytest.fixture(scope='module')
def fitted(shapes):
    return SelfClassifier(3, **SMALL).fit(shapes.subset(range(60)))


# ---- scikit-learn's own checks --------------------------------------------------------------------------------------------

class Strips(SelfClassifier):
    """SelfClassifier for rows of any few numbers, which scikit-learn's checks hand to everything: a row becomes the first pixels of a square.

    Only this differs from the estimator of the library, so that the checks can run whose data are rows of 2, 3 or 5 features.
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = True, False
        return tags

    def _images(self, X, span=None, size=None):
        rows = X if hasattr(X, 'to_numpy') or not hasattr(X, '__array__') and not isinstance(X, list) else np.asarray(X)
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind not in 'fiubO' or not rows.size:
            return super()._images(X, span, size)
        side = int(np.ceil(rows.shape[1]**.5))
        images, span, _ = super()._images(np.pad(rows, [(0, 0), (0, side * side - rows.shape[1])]), span, size)
        return images, span, rows.shape[1]


NOT_FOR_PICTURES = {          # name of a check -> why it does not apply to pictures
    'check_clustering': 'asks that three clouds of points in a plane are told apart; as grey levels of two pixels, which views make brighter and darker, they are one picture',
    'check_array_api_input': 'asks nothing unless an environment variable of SciPy is set; arrays of other libraries are no input of this estimator'}


def name_of(check):
    "Name of a check, which scikit-learn may wrap in a partial function."
    return getattr(check, 'func', check).__name__


def quick(kind=Strips, n_clusters=2):
    return kind(n_clusters, views=dict(preset='glyphs', n_local=0, global_size=8), backbone=dict(backbone='convnet', width=2, hidden=None, dim=8), epochs=1,
                batch_size=8, device='cpu', verbose=0, random_state=0)


CHECKS = [check for _, check in estimator_checks_generator(quick())]


@pytest.mark.parametrize('check', [check for check in CHECKS if name_of(check) not in NOT_FOR_PICTURES], ids=name_of)
def test_rules_of_scikit_learn(check):
    check(quick())


def test_checks_that_do_not_apply_are_still_there():
    assert set(NOT_FOR_PICTURES) <= set(map(name_of, CHECKS)), 'scikit-learn has renamed or dropped one of them'


# ---- forms of pictures ----------------------------------------------------------------------------------------------------

class Pairs(torch.utils.data.Dataset):
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images[i].float() / 255, 1


def written(images, folder):
    for i in range(len(images)):
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder/f'{i:03}.png')
    return sorted(folder.glob('*.png'))


def test_one_answer_for_all_forms(shapes, fitted, tmp_path):
    some = shapes.subset(range(20))
    paths, pixels, expected = written(some, tmp_path), some.pixels, fitted.predict(some)
    grey = pixels[:, 0].numpy()
    forms = dict(folder=tmp_path, folder_name=str(tmp_path), paths=paths, names=list(map(str, paths)), column=pd.Series(list(map(str, paths))), frame=pd.DataFrame({'file': paths}),
                 array_of_names=np.array(list(map(str, paths))), dataset=Pairs(some), pictures=[Image.open(path) for path in paths])
    for name, form in forms.items():
        assert fitted.predict(form).tolist() == expected.tolist(), name
    numbers = dict(bytes=grey, last=pixels.permute(0, 2, 3, 1).numpy(), first=pixels, rows=grey.reshape(20, -1), float64=grey.astype(float), share=grey / 255)
    for name, form in numbers.items():
        learned = SelfClassifier(3, **SMALL).fit(form)
        assert learned.n_features_in_ == np.prod(form.shape[1:]) and np.allclose(learned.transform(form), learned.embedding_, atol=1e-6), name


def test_pixel_range_is_learned_once(digits):
    learned = SelfClassifier(3, **SMALL).fit(digits.images[:60])
    assert learned.pixel_range_ == (0, 16)
    dark = digits.images[:5] * (3 / 16)
    assert np.allclose(learned._pictures(dark).pixels.max().item(), 255 * 3 / 16, atol=8), 'a dark batch stays dark'
    assert SelfClassifier(3, **SMALL).fit(digits.images[:60] - 8).pixel_range_ == (-8, 8)


def test_pictures_that_differ_in_size(shapes, fitted, tmp_path):
    sizes = [(20, 30), (16, 16), (9, 40)]
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)) for i, size in enumerate(sizes)]
    assert fitted.predict(pictures).shape == (3,) and fitted.predict(Pairs([torch.zeros(3, 8, 8), torch.ones(3, 5, 5)])).shape == (2,)
    learned = SelfClassifier(2, **{**SMALL, 'batch_size': 2}, views=dict(preset='natural', n_local=0, global_size=16)).set_params(
        backbone=dict(backbone='convnet', width=2, hidden=None, dim=8, classes=[2])).fit(pictures)
    assert learned.labels_.shape == (3,) and np.isfinite(learned.embedding_).all()


def test_bad_pictures_are_named(fitted, tmp_path):
    cases = [(['no.png'], 'no.png is no file'), (str(tmp_path/'none'), 'does not exist'), (np.zeros((4, 7)), 'image_shape'), (np.zeros((3, 2, 5, 6)), 'pictures must be'),
             (np.full((3, 8, 8), np.inf), 'infinity'), (np.zeros((0, 8, 8)), '0 sample'), (np.array(['a']), 'a is no file'), (np.zeros(4), 'Reshape your data')]
    for X, words in cases:
        with pytest.raises(DataError, match=words):
            SelfClassifier(3, **SMALL).fit(X)
    with pytest.raises(DataError, match='expecting 768 features'):
        fitted.predict(np.zeros((2, 64)))
    (tmp_path/'broken.png').write_bytes(b'no picture')
    with pytest.raises(DataError, match='broken.png'):
        fitted.predict([tmp_path/'broken.png'])


def write_shapes(shapes, folder, places):
    "Pictures as files at these places below a folder."
    for i, place in enumerate(places):
        (folder/place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.pixels[i].permute(1, 2, 0).numpy()).save(folder/place)


def test_a_folder_means_all_pictures_below_it(shapes, fitted, tmp_path):
    "As for `selfclass cluster`: loose files beside sub-folders, sub-folders called like splits, a file that is broken."
    places = ['2019/march/0.png', 'loose.png', 'test/0.png', 'train/0.png', 'train/1.png', 'z.png']
    write_shapes(shapes, tmp_path, places)
    whole = SelfClassifier(3, **{**SMALL, 'batch_size': 4}).fit(str(tmp_path))
    assert whole.labels_.shape == (6,) and np.array_equal(whole.labels_, whole.predict([tmp_path/place for place in places])) and np.array_equal(whole.labels_, whole.predict(tmp_path))
    assert whole.result(tmp_path).paths.tolist() == places and whole.result(tmp_path/'train').root == tmp_path/'train'
    (tmp_path/'test'/'broken.png').write_bytes(b'no picture')
    with pytest.warns(UnreadablePictureWarning, match='1 of 7 pictures .* left out: test/broken.png'):
        learned = SelfClassifier(3, **{**SMALL, 'batch_size': 4}).fit(tmp_path)
    assert np.array_equal(learned.embedding_, whole.embedding_)
    with pytest.warns(UnreadablePictureWarning, match='test/broken.png'):
        assert np.array_equal(learned.predict(tmp_path), whole.labels_)
    with pytest.warns(UnreadablePictureWarning):
        assert learned.result(tmp_path).paths.tolist() == places
    assert fitted.predict(load_images(tmp_path/'train')).shape == (2,)             # one split, as `load_images` reads a folder
    (tmp_path/'train'/'round').symlink_to(tmp_path)
    with pytest.warns(UnreadablePictureWarning, match='1 of 7'):
        assert len(learned.predict(tmp_path)) == 6


@pytest.mark.parametrize('wrong, words', [
    (dict(n_clusters=0), 'n_clusters'), (dict(n_clusters=2.5), 'n_clusters'), (dict(n_clusters=[]), 'n_clusters'), (dict(n_clusters=[3, 3]), 'n_clusters'), (dict(epochs=0), 'epochs'),
    (dict(batch_size='large'), 'batch_size'), (dict(backbone='resnet19'), 'resnet18'), (dict(views='glyph'), 'glyphs'), (dict(views=dict(preset='glyphs', rotaton=3.)), 'rotation'),
    (dict(device='abacus'), 'abacus'), (dict(n_clusters=3, prior=[.5, .5]), 'prior'), (dict(n_clusters=4), 'a head of n_clusters')])
def test_bad_parameters_are_named_by_fit(shapes, wrong, words):
    estimator = SelfClassifier(**{**SMALL, 'n_clusters': 3, 'batch_size': 16, **wrong})
    with pytest.raises(ParamsError, match=words):
        estimator.fit(shapes.subset(range(40)))


# ---- the rules by hand ----------------------------------------------------------------------------------------------------

def test_several_numbers_of_classes(shapes):
    sizes = [2, 4]
    learned = SelfClassifier(sizes, **{**SMALL, 'backbone': 'convnet', 'batch_size': 32}).fit(shapes.subset(range(64)))
    assert learned.labels_.shape == (64, 2) and set(learned.network_.classes) == {2, 4, 8, 16}
    probs = learned.predict_proba(shapes.subset(range(5)))
    assert [p.shape for p in probs] == [(5, 2), (5, 4)] and all(np.allclose(p.sum(1), 1, atol=1e-5) for p in probs)
    assert np.array_equal(learned.predict(shapes.subset(range(64))), learned.labels_)
    assert -100 < learned.score(shapes.subset(range(64))) < 0 < learned.score(shapes.subset(range(64)), shapes.labels[:64]) <= 1


def test_the_same_seed_the_same_model(shapes):
    some, state = shapes.subset(range(40)), (random.getstate(), torch.get_rng_state())
    np.random.seed(1)
    first, second = SelfClassifier(3, **SMALL).fit(some), SelfClassifier(3, **SMALL).fit(some)
    assert np.array_equal(first.embedding_, second.embedding_) and first.score(some) == second.score(some)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1]), 'fit leaves the generators of the program alone'
    drawn = SelfClassifier(3, **{**SMALL, 'random_state': np.random.RandomState(3)}).fit(some)
    again = SelfClassifier(3, **{**SMALL, 'random_state': drawn.seed_}).fit(some)
    assert np.array_equal(drawn.embedding_, again.embedding_)


def test_score(shapes, fitted):
    some, labels = shapes.subset(range(60)), shapes.labels[:60]
    words = np.array(shapes.class_names)[labels]
    assert fitted.score(some, labels) == fitted.score(some, words) == fitted.score(some, labels + 7)
    assert fitted.score(some) == fitted.score(some) < 0
    holes = [None if i % 5 == 0 else word for i, word in enumerate(words.tolist())]
    assert fitted.score(some, holes) == fitted.score(some, pd.Series(holes)) == fitted.score(some, np.where(np.arange(60) % 5 == 0, -1, labels))
    named = fitted.result(some, holes)
    assert named.labels.min() == -1 and [named.class_names[c] for c in named.labels if c >= 0] == [word for word in holes if word]
    with pytest.raises(DataError, match='mixes words and numbers, found .* and 1;'):
        fitted.score(some, [*words[:-1], 1])
    with pytest.raises(DataError, match='one entry per image'):
        fitted.score(some, labels[:5])
    with pytest.raises(NotFittedError):
        SelfClassifier().predict(some)


def test_save_and_load(shapes, fitted, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError('pickle was used')
    for name in ('dump', 'dumps', 'load', 'loads', 'Pickler', 'Unpickler'):
        monkeypatch.setattr(pickle, name, forbidden)
    folder = fitted.save(tmp_path/'model')
    loaded = SelfClassifier.load(folder)
    assert {path.name for path in folder.iterdir()} == {'model.safetensors', 'config.json', 'estimator.npz'}
    assert loaded.get_params() == fitted.get_params()
    for name in ('labels_', 'embedding_', 'loss_curve_'):
        assert np.array_equal(getattr(loaded, name), getattr(fitted, name))
    some = shapes.subset(range(9))
    assert np.array_equal(loaded.predict_proba(some), fitted.predict_proba(some)) and loaded.score(some) == fitted.score(some)
    turned = shapes.subset(range(19, -1, -1))
    assert np.array_equal(loaded.fit(turned).labels_, clone(fitted).fit(turned).labels_), 'a loaded estimator can be trained anew'
    with pytest.raises(MissingInputError):
        SelfClassifier.load(tmp_path)
    config = json.loads((folder/'config.json').read_text())
    del config['estimator']
    (folder/'config.json').write_text(json.dumps(config))
    with pytest.raises(DataError, match='no estimator'):
        SelfClassifier.load(folder)


def test_pickle_works_too(shapes, fitted):
    some = shapes.subset(range(9))
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict(some), fitted.predict(some))


def test_pipeline_and_search(digits):
    X, y = digits.data[:80], digits.target[:80]
    pipe = make_pipeline(FunctionTransformer(lambda rows: rows / 16), SelfClassifier(3, **SMALL), LogisticRegression(max_iter=1000))
    assert pipe.fit(X, y).predict(X).shape == (80,)
    search = GridSearchCV(SelfClassifier(3, **SMALL), dict(epochs=[1, 2], views=['auto', 'natural']), cv=KFold(2)).fit(digits.images[:80])
    assert np.isfinite(search.cv_results_['mean_test_score']).all() and search.best_estimator_.predict(digits.images[:4]).shape == (4,)
    names = SelfClassifier(3, **SMALL).set_output(transform='pandas').fit(X).transform(X)
    assert names.columns[0] == 'selfclassifier0' and len(names) == 80


def test_public_names():
    assert selfclass.SelfClassifier is SelfClassifier and selfclass.estimate_n_clusters is estimate_n_clusters


# ---- when things go wrong -------------------------------------------------------------------------------------------------

def interrupted_after(monkeypatch, epochs):
    original = estimator.Record.__call__

    def record(self, epoch, loss, lr):
        original(self, epoch, loss, lr)
        if epoch + 1 == epochs:
            raise KeyboardInterrupt
    monkeypatch.setattr(estimator.Record, '__call__', record)


def test_interruption_keeps_the_model_so_far(shapes, monkeypatch):
    some = shapes.subset(range(40))
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.warns(ConvergenceWarning, match='after epoch 2 of 6'):
            learned = SelfClassifier(3, **{**SMALL, 'epochs': 6}).fit(some)
    assert learned.n_epochs_ == len(learned.loss_curve_) == 2 and learned.predict(some).shape == (40,)
    with monkeypatch.context() as patch:
        patch.setattr(estimator.Record, '__call__', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            SelfClassifier(3, **SMALL).fit(some)


def test_a_stopped_fit_goes_on_from_its_checkpoint(shapes, tmp_path, monkeypatch):
    some, numbers = shapes.subset(range(40)), {**SMALL, 'epochs': 6}
    whole = SelfClassifier(3, **numbers).fit(some)

    class Mortal(estimator.Checkpoint):
        def save(self, epoch):
            super().save(epoch)
            if epoch == 3: raise MemoryError('the power fails')
    with monkeypatch.context() as patch:
        patch.setattr(estimator, 'Checkpoint', Mortal)
        with pytest.raises(MemoryError):
            SelfClassifier(3, **numbers, checkpoints=tmp_path).fit(some)
    assert len(list(tmp_path.rglob('last.pt'))) == 1
    trained, fit = [], estimator.fit
    monkeypatch.setattr(estimator, 'fit', lambda *given: trained.append(given[4] - given[6]) or fit(*given))
    resumed = SelfClassifier(3, **numbers, checkpoints=tmp_path).fit(some)
    assert trained == [2], 'epochs of the second command'
    assert np.array_equal(resumed.embedding_, whole.embedding_) and np.array_equal(resumed.loss_curve_, whole.loss_curve_)
    assert not list(tmp_path.rglob('last.pt')), 'a finished fit leaves none'


def test_short_memory_halves_the_batch(shapes, monkeypatch):
    tried, fit_heads = [], estimator.fit_heads

    def small_device(images, recipe, *rest):
        tried.append(recipe['batch_size'])
        if recipe['batch_size'] > 70:
            raise torch.OutOfMemoryError('no room')
        return fit_heads(images, recipe, *rest)
    monkeypatch.setattr(estimator, 'fit_heads', small_device)
    learned = SelfClassifier(3, **{**SMALL, 'batch_size': 'auto'}).fit(shapes.subset(range(200)))
    assert tried == [200, 100, 50] and learned.recipe_['batch_size'] == 50
    with pytest.raises(TrainingError, match='a batch of 100 does not fit'):
        SelfClassifier(3, **{**SMALL, 'batch_size': 100}).fit(shapes.subset(range(200)))


def test_collapse_is_a_warning(shapes):
    still = dict.fromkeys(('rotation', 'scale', 'stretch', 'shear', 'shift', 'elastic', 'noise'), 0.)
    with pytest.warns(ConvergenceWarning, match='Collapsed'):
        SelfClassifier(3, **{**SMALL, 'epochs': 5}, views=dict(preset='glyphs', n_local=0, global_size=8, **still)).fit(np.full((40, 16, 16), 9, np.uint8))


def test_bar_only_where_there_is_a_terminal(shapes, capfd, monkeypatch):
    monkeypatch.delenv('SELFCLASS_PROGRESS', raising=False)
    SelfClassifier(3, **{**SMALL, 'verbose': 1}).fit(shapes.subset(range(40)))
    assert capfd.readouterr() == ('', ''), 'not in a log file'
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    SelfClassifier(3, **{**SMALL, 'verbose': 1}).fit(shapes.subset(range(40)))
    assert 'training' in capfd.readouterr().err
    SelfClassifier(3, **SMALL).fit(shapes.subset(range(40))).predict(shapes)
    assert capfd.readouterr() == ('', '') and 'SELFCLASS_PROGRESS' not in os.environ


# ---- how many classes -----------------------------------------------------------------------------------------------------

def drawn_letters(letters, per_class, seed=0, side=16):
    "White letters on black paper, moved, turned and of several sizes: uint8 (N, side, side)."
    rng, pictures = np.random.default_rng(seed), []
    for letter in letters * per_class:
        page = Image.new('L', (64, 64))
        ImageDraw.Draw(page).text((32, 32), letter, fill=255, font=ImageFont.load_default(size=int(rng.integers(40, 52))), anchor='mm', stroke_width=int(rng.integers(0, 3)))
        page = page.rotate(rng.uniform(-12, 12), translate=tuple(rng.integers(-4, 5, 2)), resample=Image.Resampling.BILINEAR)
        pictures.append(np.asarray(page.resize((side, side), Image.Resampling.BILINEAR)))
    return np.stack(pictures)


def test_count_in_short(shapes):
    count = estimate_n_clusters(shapes.subset(range(120)), [2, 4, 6], n_seeds=1, epochs=12, batch_size=60, random_state=0, verbose=0)
    assert isinstance(count, ClusterCount) and count.best in (2, 4, 6) and count.candidates.tolist() == [2, 4, 6]
    assert set(count.scores) == {'agreement', 'stability', 'information', 'silhouette', 'score'} and np.isnan(count.scores['stability']).all()
    assert np.allclose(count.scores['score'], count.scores['agreement'] * count.scores['information'] / np.log([2, 4, 6])**.75)
    assert len(count.plot().axes) == 3
    for wrong in ([3], [1, 2], [2, 2], [], 5):
        with pytest.raises(ParamsError, match='n_clusters|candidates'):
            estimate_n_clusters(shapes, wrong)
    with pytest.raises(ParamsError, match='n_seeds'):
        estimate_n_clusters(shapes, [2, 3], n_seeds=0)


@pytest.mark.long
@pytest.mark.parametrize('name, true, within', [('digits', 10, 1), ('six digits', 6, 1), ('letters', 8, 1), ('more letters', 12, 2)])
def test_count_is_near(digits, name, true, within):
    "10 digits within 1; six of the digits, and eight and twelve letters drawn here, within a fifth."
    some = np.isin(digits.target, [0, 1, 3, 4, 6, 7])
    X = {'digits': digits.images, 'six digits': digits.images[some], 'letters': drawn_letters('ACEHKSXZ', 120), 'more letters': drawn_letters('ABDEFGKLRSTZ', 100, 2)}[name]
    assert abs(estimate_n_clusters(X, random_state=0, verbose=0).best - true) <= within


# ---- the digits -----------------------------------------------------------------------------------------------------------

def test_digits_in_short(digits):
    learned = SelfClassifier(10, epochs=60, random_state=5, verbose=0).fit(digits.images)
    assert learned.score(digits.images, digits.target) >= .9


@pytest.mark.long
def test_digits_reach_the_goal(digits):
    scores = [SelfClassifier(10, random_state=seed, verbose=0).fit(digits.images).score(digits.images, digits.target) for seed in range(5)]
    assert np.mean(scores) >= .96 and min(scores) >= .93, scores


def test_a_result_to_look_at(shapes, fitted, tmp_path):
    from PIL import Image
    from selfclass.result import load_result
    for i in range(3):
        Image.fromarray(shapes.pixels[i].permute(1, 2, 0).numpy()).save(tmp_path/f'{i}.png')
    seen, files = fitted.result(shapes, shapes.labels), fitted.result(tmp_path)
    assert np.array_equal(seen.cluster, fitted.predict(shapes)) and np.array_equal(seen.pixels, shapes.pixels) and np.array_equal(seen.labels, shapes.labels)
    assert files.root == tmp_path and list(files.paths) == ['0.png', '1.png', '2.png'] and files.pixels is None
    again = load_result(seen.save(tmp_path/'result'))
    assert np.array_equal(again.probs, seen.probs) and again.facts == seen.facts
