"""Strong views beside PIL and torchvision v2, one picture and one operation at a time: what is drawn, what is made of it; holes, shares, files, odd pictures."""
import io
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import binom, chisquare, kstest
from torch.testing import assert_close

from selfclass.augment import OPERATIONS, RANGES, Draws, MultiCrop, apply_operations, cut_out, draw_holes, draw_operations, draw_strong
from selfclass.data import Encoded, ImageSet
from selfclass.errors import DataError, ParamsError
from selfclass.train import ViewLoader

NAMES, N = tuple(OPERATIONS), 7000
AS_SEEN = dict(mean=(0., 0., 0.), std=(1., 1., 1.))
OFF = dict(flip_p=0., n_ops=0, cutout=0.)
SIZES = 16, 32, 96


def seeded(seed): return torch.Generator().manual_seed(seed)


def photo(height, width, seed=0):
    "A smooth random picture with some sharp edges, uint8 (3,H,W), in which no channel reaches both ends."
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 9, 9), dtype=np.float32))
    pixels = torch.nn.functional.interpolate(coarse, (height, width), mode='bicubic').clamp(0, 1)[0]
    pixels[:, :height//3, :width//4] = torch.from_numpy(rng.random((3, 1, 1), dtype=np.float32))
    return (20 + 200*pixels).round().byte()


def batch(size, n=6): return torch.stack([photo(size, size, seed) for seed in range(n)])


def encoded(picture):
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, 'png')
    return file.getvalue()


def likely(count, p, n): return binom.ppf(5e-6, n, p) <= count <= binom.ppf(1 - 5e-6, n, p)


# ---- each operation --------------------------------------------------------------------------------------------------

def shear(**degrees): return [float(np.degrees(np.arctan(degrees.get(axis, 0.)))) for axis in 'xy']


TORCHVISION = {
    'identity': lambda x, v: x, 'autocontrast': lambda x, v: TF.autocontrast(x), 'equalise': lambda x, v: TF.equalize(x), 'rotate': TF.rotate,
    'solarise': lambda x, v: TF.solarize(x, v) if v <= 255 else x, 'colour': TF.adjust_saturation, 'contrast': TF.adjust_contrast, 'brightness': TF.adjust_brightness,
    'sharpness': TF.adjust_sharpness, 'posterise': lambda x, v: TF.posterize(x, int(v)),
    'shear_x': lambda x, v: TF.affine(x, 0, [0, 0], 1, shear(x=v), center=[0, 0]), 'shear_y': lambda x, v: TF.affine(x, 0, [0, 0], 1, shear(y=v), center=[0, 0]),
    'translate_x': lambda x, v: TF.affine(x, 0, [-round(v*x.shape[-1]), 0], 1, [0, 0]), 'translate_y': lambda x, v: TF.affine(x, 0, [0, -round(v*x.shape[-1])], 1, [0, 0]),
}
PIL = {
    'identity': lambda x, v: x, 'autocontrast': lambda x, v: ImageOps.autocontrast(x), 'equalise': lambda x, v: ImageOps.equalize(x), 'rotate': lambda x, v: x.rotate(v),
    'solarise': ImageOps.solarize, 'colour': lambda x, v: ImageEnhance.Color(x).enhance(v), 'contrast': lambda x, v: ImageEnhance.Contrast(x).enhance(v),
    'brightness': lambda x, v: ImageEnhance.Brightness(x).enhance(v), 'sharpness': lambda x, v: ImageEnhance.Sharpness(x).enhance(v),
    'posterise': lambda x, v: ImageOps.posterize(x, int(v)),
    'shear_x': lambda x, v: x.transform(x.size, Image.Transform.AFFINE, (1, v, 0, 0, 1, 0)), 'shear_y': lambda x, v: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 0, v, 1, 0)),
    'translate_x': lambda x, v: x.transform(x.size, Image.Transform.AFFINE, (1, 0, v*x.size[0], 0, 1, 0)),
    'translate_y': lambda x, v: x.transform(x.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, v*x.size[1])),
}
EXACT = 'identity', 'equalise', 'solarise', 'posterise'
CUTS_OFF = {'autocontrast': 1, 'brightness': 1, 'colour': 2, 'contrast': 2, 'sharpness': 2}          # 2: the faded picture and its blend
MOVING = 'rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y'


def by_pil(name, picture, value): return TF.pil_to_tensor(PIL[name](TF.to_pil_image(picture), value))


def strengths(name):
    "The ends of the interval and two places between them, one of them no round number."
    low, high = RANGES.get(name, (0, 0))
    return (low, low + .371*(high - low), high) if name not in ('posterise', 'solarise') else (low, (low + high)/2, high)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', NAMES)
def test_each_operation_is_that_of_torchvision_and_pil(name, size):
    "In grey levels: exact where bytes are exact; within 1 for each time that they cut off a fraction and we do not; motions move the same pixels, up to ties."
    pictures = batch(size)
    for value in strengths(name):
        ours = 255*OPERATIONS[name](pictures/255, torch.full((len(pictures),), float(value)))
        for theirs in (torch.stack([TORCHVISION[name](picture, value) for picture in pictures]), torch.stack([by_pil(name, picture, value) for picture in pictures])):
            apart = (ours - theirs).abs()
            if name in MOVING: assert (apart > .01).float().mean() < 2e-3, value
            else: assert apart.max() < .01 + CUTS_OFF.get(name, 0), value


@pytest.mark.parametrize('name', sorted(set(NAMES) - set(MOVING) - set(EXACT)))
def test_floats_are_torchvision_floats(name):
    "Where nothing is rounded there is no tolerance but that of float32."
    pictures = batch(32)/255
    for value in strengths(name):
        assert_close(OPERATIONS[name](pictures, torch.full((6,), float(value))), torch.stack([TORCHVISION[name](picture, value) for picture in pictures]), atol=2e-6, rtol=0)


@pytest.mark.parametrize('name', NAMES)
def test_each_sample_has_its_own_strength(name):
    pictures, (low, high) = torch.rand(8, 3, 24, 24, generator=seeded(0)), RANGES.get(name, (0., 0.))
    amounts = torch.linspace(low, high, 8).round() if name == 'posterise' else torch.linspace(low, high, 8)
    together = OPERATIONS[name](pictures, amounts)
    assert torch.equal(together, torch.cat([OPERATIONS[name](pictures[i:i + 1], amounts[i:i + 1]) for i in range(8)]))
    assert 0 <= together.min() and together.max() <= 1


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('value', [0, 1, 77, 254, 255])
def test_even_pictures(name, value):
    "Nothing but valid grey levels comes of a picture of one value; what looks at the picture finds nothing to stretch."
    even, (low, high) = torch.full((3, 3, 11, 11), value/255), RANGES.get(name, (0, 0))
    for amount in (low, high):
        changed = OPERATIONS[name](even, torch.full((3,), float(amount)))
        assert changed.isfinite().all() and 0 <= changed.min() and changed.max() <= 1
        if name in ('autocontrast', 'equalise', 'contrast', 'colour', 'sharpness', 'identity'): assert_close(changed, even, atol=1.1e-4, rtol=0)     # weights of 0.9999


def test_a_sequence_is_that_of_pil():
    "Four operations in the drawn order, each picture its own, beside PIL on bytes: a level of rounding apart, but where an edge of solarising, equalising or stretching multiplies it."
    pictures, drawn = batch(32, 60), draw_operations(60, 4, NAMES, RANGES, Draws(seeded(1)))
    ours, slow = 255*apply_operations(pictures/255, NAMES, **drawn), []
    for i, picture in enumerate(pictures):
        for k, value in zip(drawn['operation'][i].tolist(), drawn['magnitude'][i].tolist()): picture = by_pil(NAMES[k], picture, value)
        slow.append(picture)
    apart = (ours - torch.stack(slow)).abs()
    near = apart.mean((1, 2, 3))
    assert near.median() < 1 and (near < 3).float().mean() > .9 and (apart < 2.5).float().mean() > .93


def test_what_an_operation_loses_does_not_come_back():
    "Between two operations a picture has 256 levels: of one dimmed to 5 % no more than 13 are left to be stretched."
    pictures, both = batch(32), (torch.tensor([[0, 1]]).expand(6, -1), torch.tensor([[.0503, 0.]]).expand(6, -1))
    ours = apply_operations(pictures/255, ('brightness', 'autocontrast'), *both)
    left = [len(channel.unique()) for channel in ours.flatten(0, 1)]
    assert max(left) <= 13 and ours.amax() == 1
    stretched = torch.stack([TF.autocontrast((.0503*picture).round()/255) for picture in pictures])
    assert_close(ours, stretched, atol=1e-6, rtol=0)


# ---- what is drawn ---------------------------------------------------------------------------------------------------

def test_operations_are_uniform_and_with_replacement():
    operation = draw_operations(N, 4, NAMES, RANGES, Draws(seeded(0)))['operation']
    for slot in operation.T: assert chisquare(slot.bincount(minlength=14)).pvalue > 1e-4
    pairs = (operation[:, 0]*14 + operation[:, 1]).bincount(minlength=14*14)
    assert chisquare(pairs).pvalue > 1e-4                                                # slots know nothing of each other
    distinct = sum(len(set(row)) == 4 for row in operation.tolist())
    assert likely(distinct, 14*13*12*11/14**4, N)


@pytest.mark.parametrize('name', sorted(RANGES))
def test_magnitudes_are_uniform(name):
    (low, high), drawn = RANGES[name], draw_operations(N, 4, NAMES, RANGES, Draws(seeded(1)))
    values = drawn['magnitude'][drawn['operation'] == NAMES.index(name)].numpy()
    if name == 'posterise':
        bits, often = np.unique(values, return_counts=True)
        assert bits.tolist() == [4, 5, 6, 7, 8] and chisquare(often).pvalue > 1e-4
    else:
        assert low <= values.min() and values.max() <= high and kstest(values, 'uniform', (low, high - low)).pvalue > 1e-4


def test_own_intervals_and_both_signs():
    own = {'rotate': (10., 20.), 'brightness': (.2, .4), 'posterise': (5, 5)}
    operation, magnitude = draw_operations(N, 2, tuple(own), own, Draws(seeded(2))).values()
    turns, kept, bits = (magnitude[operation == k] for k in range(3))
    assert turns.abs().min() >= 10 and turns.abs().max() <= 20 and likely((turns < 0).sum().item(), .5, len(turns))      # motions go both ways
    assert .2 <= kept.min() and kept.max() <= .4 and bits.unique().tolist() == [5]                                       # the others do not


def test_flips_and_corners():
    drawn = draw_strong(N, 40, 55, 32, Draws(seeded(3)), .5, 1/3, 4, NAMES, RANGES)
    assert likely(drawn['flipped'].sum().item(), .5, N)
    for corners, places in zip(drawn['corners'].T, (9, 24)):
        assert corners.max() < places and chisquare(corners.bincount(minlength=places)).pvalue > 1e-4
    ragged = draw_strong(N, torch.tensor([32, 64]).repeat(N//2), torch.tensor([40, 32]).repeat(N//2), 32, Draws(seeded(3)), .5, 1/3, 4, NAMES, RANGES)['corners']
    assert ragged[::2].amax(0).tolist() == [0, 8] and ragged[1::2].amax(0).tolist() == [32, 0]


# ---- the hole --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size, cutout, largest', [(32, .5, 16), (96, 1/3, 32), (224, 1/3, 75), (16, 1/3, 5)])
def test_holes_are_uniform_in_side_and_place(size, cutout, largest):
    holes = draw_holes(N, size, cutout, Draws(seeded(0)))
    side, centre = holes[:, 2], holes[:, :2] + holes[:, 2:]//2
    assert side.min() == 1 and side.max() == largest and chisquare((side - 1).bincount(minlength=largest)).pvalue > 1e-4
    for axis in centre.T: assert axis.min() == 0 and axis.max() == size - 1 and chisquare(axis.bincount(minlength=size)).pvalue > 1e-4


@pytest.mark.parametrize('size', SIZES)
def test_holes_are_square_and_alone(size):
    "Zero in the square as far as it lies in the view, and the same views as without a hole everywhere else."
    holes, views = draw_holes(200, size, .5, Draws(seeded(1))), torch.ones(200, 3, size, size)
    for lost, (top, left, side) in zip(1 - cut_out(views, holes), holes.tolist()):
        rows, columns = (range(max(start, 0), min(start + side, size)) for start in (top, left))
        assert lost.sum() == 3*len(rows)*len(columns) and lost[:, rows.start:rows.stop, columns.start:columns.stop].all()
    whole, holed = (MultiCrop('strong', 1, 0, size, n_ops=0, cutout=cutout)(batch(size), seeded(2))[0] for cutout in (0., .5))
    lost = holed == 0
    assert lost.any((1, 2, 3)).all() and torch.equal(holed[~lost], whole[~lost])
    assert torch.equal(lost.all(1), lost.any(1))                                         # in all channels alike


# ---- whole views -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', SIZES)
def test_nothing_left_to_do_is_the_plain_view(size):
    recipe, pictures = MultiCrop('strong', 2, 0, size, **OFF), batch(size)
    for view in recipe(pictures, seeded(0)): assert torch.equal(view, recipe.plain(pictures))
    mirrored = MultiCrop('strong', 1, 0, size, **OFF | {'flip_p': 1.})(pictures, seeded(0))[0]
    assert torch.equal(mirrored, recipe.plain(pictures).flip(3))


def test_a_larger_picture_is_brought_to_size_and_cut():
    recipe, pictures = MultiCrop('strong', 1, 0, 32, **OFF, **AS_SEEN), torch.stack([photo(80, 120, seed) for seed in range(6)])
    resized = TF.resize(pictures/255, [37, 55], interpolation=TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    corners = draw_strong(6, 37, 55, 32, Draws(seeded(0)), 0., 0., 0, NAMES, RANGES)['corners']
    for view, picture, (top, left) in zip(recipe(pictures, seeded(0))[0], resized, corners.tolist()):
        assert_close(view, TF.crop(picture, top, left, 32, 32), atol=1e-6, rtol=0)
    assert len(set(map(tuple, corners.tolist()))) > 1


@pytest.mark.parametrize('size', SIZES)
def test_views_stay_in_range(size):
    for height, width in ((size, size), (8, 8), (50, 31), (1, 1), (2, 9)):
        pictures = torch.stack([photo(height, width), torch.zeros(3, height, width).byte(), torch.full((3, height, width), 255).byte()]).repeat(12, 1, 1, 1)
        for view in MultiCrop('strong', 2, 1, size, 8, **AS_SEEN)(pictures, seeded(size)):
            assert view.dtype == torch.float32 and view.isfinite().all() and 0 <= view.min() and view.max() <= 1


def test_operations_and_intervals_reach_the_views():
    pictures = batch(32)
    def made(**options): return MultiCrop('strong', 1, 0, 32, **OFF | {'n_ops': 1} | options, **AS_SEEN)(pictures, seeded(0))[0]
    assert torch.equal(made(operations=('identity',)), pictures/255)
    for name in ('solarise', 'colour', 'contrast', 'brightness', 'sharpness', 'posterise'):
        value = {'solarise': 90., 'posterise': 2}.get(name, .3)
        slow = torch.stack([by_pil(name, picture, value) for picture in pictures])
        assert (255*made(operations=(name,), **{name: (value, value)}) - slow).abs().max() < .01 + CUTS_OFF.get(name, 0), name
    for name in MOVING:
        value = 20. if name == 'rotate' else .25
        ways = [torch.stack([by_pil(name, picture, sign*value) for picture in pictures]) for sign in (1, -1)]
        moved = 255*made(operations=(name,), **{name: (value, value)})
        apart = torch.stack([((moved - way).abs() > .5).float().mean((1, 2, 3)) for way in ways])
        assert apart.amin(0).max() < 2e-3 < apart.amax(0).min() and len(apart.argmin(0).unique()) == 2, name       # one of the two ways, both among six


def test_the_same_numbers_the_same_views():
    recipe, pictures = MultiCrop('strong', 2, 2, 32, 16), batch(32)
    before = torch.get_rng_state()
    first, again, other = (recipe(pictures, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not any(torch.equal(a, b) for a, b in zip(first, other))
    same = recipe(pictures[:1].expand(6, -1, -1, -1).contiguous(), seeded(0))             # one picture six times: no two views alike
    for group in (torch.cat(same[:2]), torch.cat(same[2:])): assert len(group.flatten(1).unique(dim=0)) == len(group)


def test_the_steps_of_a_gpu():
    "What a GPU does, all samples and a mask, gives what the CPU's chosen samples give."
    recipe, pictures = MultiCrop('strong', 2, 1, 32, 16), batch(32, 40)
    chosen = recipe(pictures, seeded(0))
    with mock.patch.object(torch.Tensor, 'is_cuda', True): masked = recipe(pictures, seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(chosen, masked))


# ---- shares, lists, files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [20, 200])
@pytest.mark.parametrize('kind', ['square', 'tensor', 'one size', 'ragged', 'files'])
def test_shares_are_one_batch(kind, size):
    recipe, n = MultiCrop('strong', 2, 1, size, 12), 12 if size == 20 else 4
    shape = {'square': lambda seed: (size, size), 'tensor': lambda seed: (30, 40), 'one size': lambda seed: (30, 40)}.get(kind, lambda seed: (24 + 3*seed, 50 - 2*seed))
    pictures = [photo(*shape(seed), seed) for seed in range(n)]
    if kind == 'files': images, make = [encoded(picture) for picture in pictures], recipe.from_files
    else: images, make = torch.stack(pictures) if kind in ('square', 'tensor') else pictures, recipe
    alone = make(images, seeded(5))
    for step in (2, 4):
        for first in range(step):
            for view, mine in zip(alone, make(images[first::step], seeded(5), (first, step))): assert torch.equal(view[first::step], mine)
    with pytest.raises(ParamsError, match='0 <= first < step'): make(images, seeded(5), (2, 2))


def test_lists_and_files_are_their_pictures():
    recipe, pictures = MultiCrop('strong', 2, 1, 32, 16), [photo(40 + 5*seed, 70 - 3*seed, seed) for seed in range(8)]
    files = [encoded(picture) for picture in pictures]
    for a, b in zip(recipe(pictures, seeded(0)), recipe.normalise(recipe.from_files(files, seeded(0)))): assert a.dtype == b.dtype and torch.equal(a, b)
    square = batch(32)
    assert all(torch.equal(a, b) for a, b in zip(recipe(square, seeded(0)), recipe.from_files([encoded(picture) for picture in square], seeded(0))))
    with pytest.raises(DataError, match='cannot be decoded'): recipe.from_files([files[0], b'junk'], seeded(0))
    with pytest.raises(DataError, match='no images'): recipe.from_files([], seeded(0))


def test_large_files_are_decoded_no_finer_than_needed(monkeypatch):
    file, scales, decode = io.BytesIO(), [], Encoded.pixels
    Image.fromarray(photo(800, 1000).permute(1, 2, 0).numpy()).save(file, 'jpeg', quality=95)
    def watched(self, least=1.):
        pixels = decode(self, least)
        scales.append(pixels.shape[1]/self.size[0])
        assert min(pixels.shape[1:]) >= 36                                               # the 256/224 of 32 that is wanted
        return pixels
    monkeypatch.setattr(Encoded, 'pixels', watched)
    recipe = MultiCrop('strong', 2, 0, 32, **OFF, **AS_SEEN)
    coarse, = recipe.from_files([file.getvalue()]*3, seeded(0))[:1]
    assert max(scales) <= .5
    whole = recipe([Encoded(file.getvalue()).pixels()]*3, seeded(0))[0]
    assert (coarse - whole).abs().mean() < .02


@pytest.mark.parametrize('held', [True, False])
def test_loaders_take_the_preset(held, tmp_path):
    pictures, recipe = batch(32, 8), MultiCrop('strong', 1, 0, 32)
    for i, picture in enumerate(pictures): (tmp_path/f'{i}.png').write_bytes(encoded(picture))
    images = ImageSet('eight', pixels=pictures) if held else ImageSet('eight', files=tuple(sorted(tmp_path.iterdir())))
    loader = ViewLoader(images, recipe, batch_size=4, seed=3)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seen = [(index, views) for index, views in loader]
        loader.set_epoch(epoch)
        assert sorted(torch.cat([index for index, _ in seen]).tolist()) == list(range(8))
        assert all(torch.equal(index, i) and torch.equal(views[0], v[0]) for (index, views), (i, v) in zip(seen, loader))
        assert all(views[0].shape == (4, 3, 32, 32) and views[0].dtype == torch.float32 for _, views in seen)


# ---- options ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options, words', [
    (dict(solarize=(0., 256.)), ("did you mean 'solarise'?",)), (dict(n_op=3), ("did you mean 'n_ops'?",)), (dict(operations=['rotates']), ("'rotates'", "did you mean 'rotate'?")),
    (dict(operations=[]), ('at least one', 'n_ops=0')), (dict(n_ops=-1), ('views.n_ops', 'at least 0')), (dict(n_ops=2.5), ('views.n_ops', '2.5')), (dict(cutout=16), ('views.cutout', 'fraction', '16')),
    (dict(flip_p=2.), ('views.flip_p',)), (dict(posterise=(4, 9)), ('views.posterise', 'within 1 to 8')), (dict(posterise=(4.5, 8)), ('views.posterise', '4.5')),
    (dict(colour=(-.1, .5)), ('views.colour', 'low <= high')), (dict(contrast=.4), ('views.contrast', '0.4')), (dict(shear_x=(.1,)), ('views.shear_x', 'a pair')),
    (dict(translate_y=(.2, .1)), ('views.translate_y', 'a pair')), (dict(rotate=(float('nan'), 3.)), ('views.rotate',)), (dict(blur_p=(0., 0., 0.)), ('views.blur_p', 'not a parameter')),
])
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ParamsError) as error: MultiCrop('strong', **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_recipe_is_its_options():
    recipe = MultiCrop('strong', n_global=1, n_local=0, global_size=32, n_ops=2, cutout=.5, operations=['rotate', 'posterise'], posterise=[2, 3], rotate=[-5, 5])       # lists of a YAML file
    assert recipe.config['operations'] == ('rotate', 'posterise') and recipe.config['posterise'] == (2, 3) and recipe.config['rotate'] == (-5., 5.)
    for other in (pickle.loads(pickle.dumps(recipe)), MultiCrop(**recipe.config)):
        assert repr(other) == repr(recipe) and torch.equal(other(batch(32), seeded(0))[0], recipe(batch(32), seeded(0))[0])
    with pytest.raises(ParamsError, match="did you mean 'strong'"): MultiCrop('stron')
