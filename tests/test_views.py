"""Views beside torchvision v2, one picture at a time: what is drawn, and what is made of it; files, shares, odd pictures."""
import io
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy.stats import binom, ks_2samp
from torch.testing import assert_close

from selfclass.augment import Draws, MultiCrop, draw_natural
from selfclass.data import Encoded, ImageSet
from selfclass.errors import DataError, ParamsError

BICUBIC, N = T.InterpolationMode.BICUBIC, 3000
AS_SEEN = dict(mean=(0., 0., 0.), std=(1., 1., 1.))
RECIPE = dict(ratio=(3/4, 4/3), flip_p=.5, jitter_p=.8, jitter_strengths=(.4, .4, .2, .1), grayscale_p=.2, blur_sigma=(.1, 2.))
KINDS = (dict(scale=(.4, 1.), blur_p=.1, solarise_p=0.), dict(scale=(.4, 1.), blur_p=1., solarise_p=.2), dict(scale=(.05, .4), blur_p=.5, solarise_p=0.))


def seeded(seed): return torch.Generator().manual_seed(seed)


def photo(height, width, seed=0):
    "A smooth random picture, uint8 (3,H,W), with some sharp edges."
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 12, 12), dtype=np.float32))
    pixels = torch.nn.functional.interpolate(coarse, (height, width), mode='bicubic').clamp(0, 1)[0]
    pixels[:, :height//3, :width//4] = torch.from_numpy(rng.random((3, 1, 1), dtype=np.float32))
    return (255*pixels).round().byte()


def encoded(picture, kind='jpeg', mode='RGB', **options):
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).convert(mode).save(file, kind, **options)
    return file.getvalue()


def same_law(ours, theirs): return ks_2samp(np.asarray(ours), np.asarray(theirs)).pvalue > .001


def likely(count, p, n=N):
    low, high = binom.interval(.9999, n, p) if 0 < p < 1 else (n*p, n*p)
    return low <= count <= high


# ---- what is drawn ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def reference():
    "Parameters of torchvision's transforms, one call per sample."
    picture = torch.zeros(3, 200, 350)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        crops = {scale: [T.RandomResizedCrop(8, scale).make_params([picture]) for _ in range(N)] for scale in ((.4, 1.), (.05, .4))}
        jitter = [T.ColorJitter(.4, .4, .2, .1).make_params([picture]) for _ in range(N)]
        blur = [T.GaussianBlur(13, (.1, 2.)).make_params([picture])['sigma'][0] for _ in range(N)]
    return crops, jitter, blur


@pytest.mark.parametrize('kind', range(3), ids=['first global', 'other global', 'local'])
def test_distributions(kind, reference):
    crops, jitter, blur = reference
    drawn = draw_natural(N, 200, 350, Draws(seeded(kind)), **RECIPE, **KINDS[kind])
    top, left, height, width = drawn['boxes'].unbind(1)
    theirs = {name: np.array([box[name] for box in crops[KINDS[kind]['scale']]]) for name in ('top', 'left', 'height', 'width')}
    assert same_law(height*width, theirs['height']*theirs['width']) and same_law(width/height, theirs['width']/theirs['height'])
    assert same_law(top, theirs['top']) and same_law(left, theirs['left'])
    happened = drawn['factors']['hue'] != 0
    for name, theirs in (('brightness', 'brightness_factor'), ('contrast', 'contrast_factor'), ('saturation', 'saturation_factor'), ('hue', 'hue_factor')):
        assert same_law(drawn['factors'][name][happened], [params[theirs] for params in jitter]), name
    ours = np.unique(drawn['factors']['order'].numpy(), axis=0, return_counts=True)[1]
    theirs = np.unique([params['fn_idx'].numpy() for params in jitter], axis=0, return_counts=True)[1]
    assert len(ours) == len(theirs) == 24 and likely(ours.min(), 1/24) and likely(ours.max(), 1/24)
    sigma = drawn['sigma']
    assert same_law(sigma[sigma > 0], blur)
    for chosen, p in ((happened, .8), (drawn['flipped'], .5), (drawn['grey'], .2), (sigma > 0, KINDS[kind]['blur_p']), (drawn['solarised'], KINDS[kind]['solarise_p'])):
        assert likely(chosen.sum().item(), p)


def test_one_process_draws_as_ever():
    "The numbers of share (0, 1) are those of the bare generator, in the order of the recipe."
    drawn, gen = draw_natural(5, 20, 30, Draws(seeded(3)), **RECIPE, **KINDS[1]), seeded(3)
    for shape in ((5, 10), (5, 10), (5, 1), (5, 1)): torch.rand(shape, generator=gen)
    assert torch.equal(drawn['flipped'], torch.rand(5, generator=gen) < .5)
    factors = [torch.rand(5, generator=gen) for _ in range(4)]
    jittered = torch.rand(5, generator=gen) < .8
    assert torch.equal(drawn['factors']['brightness'], torch.where(jittered, .6 + (1.4 - .6)*factors[0], 1.))
    assert torch.equal(drawn['factors']['order'], torch.rand((5, 4), generator=gen).argsort(1))


# ---- what is made of it ----------------------------------------------------------------------------------------------

def parameters(recipe, n, height, width, seed):
    "The numbers behind `recipe(images, seeded(seed))`, for each view."
    draws, options = Draws(seeded(seed)), recipe.options
    kinds = [min(view, 1) if view < options['n_global'] else 2 for view in range(recipe.n_views)]
    return [draw_natural(n, height, width, draws, **RECIPE, **KINDS[kind]) for kind in kinds]


def slow_view(picture, size, drawn, i, steps):
    "View i by torchvision's functional operations on a float tensor or a PIL picture; `steps` names what a PIL picture needs."
    view = TF.resized_crop(picture, *drawn['boxes'][i].tolist(), [size, size], interpolation=BICUBIC, antialias=True)
    view = steps['clip'](view)
    view = TF.horizontal_flip(view) if drawn['flipped'][i] else view
    change = [(TF.adjust_brightness, 'brightness'), (TF.adjust_contrast, 'contrast'), (TF.adjust_saturation, 'saturation'), (TF.adjust_hue, 'hue')]
    for k in drawn['factors']['order'][i].tolist():
        operation, name = change[k]
        factor = drawn['factors'][name][i].item()
        view = operation(view, factor) if factor != (name != 'hue') else view
    view = TF.rgb_to_grayscale(view, 3) if drawn['grey'][i] else view
    view = TF.gaussian_blur(view, [13, 13], [drawn['sigma'][i].item()]*2) if drawn['sigma'][i] else view
    return steps['float'](TF.solarize(view, steps['threshold']) if drawn['solarised'][i] else view)


ON_FLOAT = dict(clip=lambda view: view.clamp(0, 1), threshold=128/255, float=lambda view: view)
ON_PIL = dict(clip=lambda view: view, threshold=128, float=lambda view: TF.pil_to_tensor(view)/255)


def grey_levels(ours, theirs):
    "Mean difference in 8-bit levels, without pixels that solarising throws to the other side."
    apart = 255*(ours - theirs).abs()
    return apart[apart < 64].mean().item(), (apart >= 64).float().mean().item()


def test_pixels_equal_torchvision_v2():
    n, size = 12, {0: 48, 1: 48, 2: 24}
    recipe = MultiCrop('natural', 2, 1, 48, 24, **AS_SEEN)
    pictures = [photo(70, 90, seed) for seed in range(n)]          # too small to be decoded at half size
    files = [encoded(picture, quality=95) for picture in pictures]
    decoded = [Encoded(file).pixels() for file in files]
    exact, fast = recipe(decoded, seeded(0)), recipe.normalise(recipe.from_files(files, seeded(0)))
    for view, drawn in enumerate(parameters(recipe, n, 70, 90, 0)):
        slow = torch.stack([slow_view(picture/255, size[view], drawn, i, ON_FLOAT) for i, picture in enumerate(decoded)])
        pil = torch.stack([slow_view(TF.to_pil_image(picture), size[view], drawn, i, ON_PIL) for i, picture in enumerate(decoded)])
        wrong = (exact[view] - slow).abs() > 1e-4
        assert wrong.float().mean() < 1e-4                         # a value on the edge of solarising
        mean, thrown = grey_levels(fast[view], slow)
        assert mean < .5 and thrown < 1e-3                         # two roundings
        mean, thrown = grey_levels(fast[view], pil)
        assert mean < 2 and thrown < .01                           # PIL rounds after each step, its HSV to 256 hues


def test_batch_equals_list():
    recipe, pixels = MultiCrop('natural', 2, 2, 32, 16, **AS_SEEN), torch.stack([photo(32, 32, seed) for seed in range(40)])
    batch, listed = recipe(pixels, seeded(0)), recipe([*pixels[:39], photo(33, 32)], seeded(0))
    for a, b in zip(batch, listed): assert ((a - b)[:39].abs() > 1e-4).float().mean() < 1e-4


def test_the_steps_of_a_gpu():
    "What a GPU does, all samples and a mask, gives what the CPU's chosen samples give."
    recipe, pixels = MultiCrop('natural', 2, 1, 32, 16, **AS_SEEN), torch.stack([photo(32, 32, seed) for seed in range(40)])
    chosen = recipe(pixels, seeded(0))
    with mock.patch.object(torch.Tensor, 'is_cuda', True): masked = recipe(pixels, seeded(0))
    for a, b in zip(chosen, masked): assert ((a - b).abs() > 1e-5).float().mean() < 1e-4


def test_yiq_is_named_and_bounded():
    picture = torch.stack([photo(64, 64, seed) for seed in range(8)])
    hsv, yiq = (MultiCrop('natural', 1, 0, 32, grayscale_p=0., hue_space=space, **AS_SEEN)(picture, seeded(0))[0] for space in ('hsv', 'yiq'))
    apart = 255*(hsv - yiq).abs()
    assert .1 < apart.mean() < 15
    still = [MultiCrop('natural', 1, 0, 32, hue=0., hue_space=space)(picture, seeded(0))[0] for space in ('hsv', 'yiq')]
    assert_close(*still, atol=1e-4, rtol=0)


# ---- shares, files, odd pictures -------------------------------------------------------------------------------------

@pytest.mark.parametrize('preset', ['natural', 'glyphs'])
@pytest.mark.parametrize('kind', ['tensor', 'one size', 'ragged', 'files'])
def test_shares_are_one_batch(preset, kind):
    recipe = MultiCrop(preset, 2, 2, 20, 12)
    pictures = [photo(30, 40, seed) if kind in ('tensor', 'one size') else photo(24 + 3*seed, 50 - 2*seed, seed) for seed in range(12)]
    if kind == 'files': images, make = [encoded(picture) for picture in pictures], recipe.from_files
    else: images, make = torch.stack(pictures) if kind == 'tensor' else pictures, recipe
    alone = make(images, seeded(5))
    assert all(torch.equal(a, b) for a, b in zip(alone, make(images, seeded(5), (0, 1))))
    for step in (2, 3, 4):
        for first in range(step):
            for view, mine in zip(alone, make(images[first::step], seeded(5), (first, step))):
                assert torch.equal(view[first::step], mine)
    with pytest.raises(ParamsError, match='0 <= first < step'): make(images, seeded(5), (2, 2))


FILES = {'grey': encoded(photo(90, 120), mode='L'), 'cmyk': encoded(photo(90, 120), mode='CMYK'), 'palette': encoded(photo(90, 120), 'png', 'P'),
         'alpha': encoded(photo(90, 120), 'png', 'RGBA'), 'png': encoded(photo(90, 120), 'png'), 'wide': encoded(photo(8, 900)), 'high': encoded(photo(900, 8)),
         'row': encoded(photo(1, 300)), 'column': encoded(photo(300, 1)), 'pixel': encoded(photo(1, 1)), 'tiny': encoded(photo(5, 6)), 'large': encoded(photo(700, 900))}


def test_odd_files():
    recipe = MultiCrop('natural', 2, 2, 32, 16)
    views = recipe.from_files(list(FILES.values()), seeded(0))
    assert [tuple(view.shape) for view in views] == [(len(FILES), 3, 32, 32)]*2 + [(len(FILES), 3, 16, 16)]*2
    assert all(view.dtype == torch.uint8 for view in views)
    exact = recipe([Encoded(file).pixels() for file in FILES.values()], seeded(0))
    for a, b in zip(exact, recipe.normalise(views)):
        assert b.isfinite().all() and (a - b).abs().mean() < .05
    for name in ('grey', 'cmyk', 'row', 'pixel'):
        assert len(recipe.from_files([FILES[name]], seeded(1))) == 4
    grey = MultiCrop('natural', 1, 1, 32, 16, **AS_SEEN).from_files([FILES['grey']]*4, seeded(0))
    assert all((view.int() - view[:, :1].int()).abs().max() <= 1 for view in grey)        # no colour comes from nowhere


def test_oriented_files():
    "The crops of a photograph that lies on its side are crops of the upright picture."
    picture, sideways = photo(60, 100), Image.Exif()
    sideways[274] = 6
    file, turned = encoded(picture, 'png'), encoded(picture.flip(2).transpose(1, 2).contiguous(), 'png', exif=sideways)
    assert Encoded(turned).size == (60, 100) and torch.equal(Encoded(file).pixels(), Encoded(turned).pixels())
    recipe = MultiCrop('natural', 2, 1, 24, 12)
    assert all(torch.equal(a, b) for a, b in zip(recipe.from_files([file], seeded(0)), recipe.from_files([turned], seeded(0))))


def test_resolution_never_falls_below_the_view(monkeypatch):
    scales, decode = [], Encoded.pixels
    def watched(self, least=1.):
        pixels = decode(self, least)
        scales.append((least, pixels.shape[1]/self.size[0]))
        return pixels
    monkeypatch.setattr(Encoded, 'pixels', watched)
    MultiCrop('natural', 2, 2, 32, 16).from_files([encoded(photo(400, 600, seed)) for seed in range(12)], seeded(0))
    assert all(least <= scale*1.02 for least, scale in scales) and {.5, .25} & {round(scale, 2) for _, scale in scales}


def test_sets_give_encoded_pictures(tmp_path):
    for i in range(4): (tmp_path/f'{i}.jpg').write_bytes(encoded(photo(40, 50 + i, i)))
    images = ImageSet('four', files=tuple(sorted(tmp_path.iterdir())))
    recipe = MultiCrop('natural', 1, 1, 24, 12)
    views = recipe.from_files(images.encoded([2, 0]), seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(views, recipe.from_files([images.files[2], str(images.files[0])], seeded(0))))
    (tmp_path/'1.jpg').write_bytes(encoded(photo(40, 50))[:200])
    with pytest.raises(DataError, match='1.jpg cannot be decoded'): recipe.from_files(images.encoded([0, 1]), seeded(0))
    with pytest.raises(DataError, match='no encoded pictures'): ImageSet('held', pixels=torch.stack([photo(8, 8)])).encoded([0])
