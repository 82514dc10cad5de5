"""Views: from JPEG files on one core beside torchvision's transforms on PIL pictures, and on whole batches of 32x32 beside kornia."""
import functools
import io
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from benchmarks.harness import Row, bandwidth
from selfclass.augment import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, crop_bytes
from selfclass.data import Encoded, decode

KINDS = (((.4, 1.), .1, 0.), ((.4, 1.), 1., .2), ((.05, .4), .5, 0.))     # crop area, blur, solarise: first global, other global, local


# ---- from files ------------------------------------------------------------------------------------------------------

def photograph(height: int, width: int, seed: int) -> bytes:
    "A JPEG with the spectrum of photographs: amplitude falls with frequency, channels are correlated."
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = 1/np.maximum(frequency, 1/max(height, width))**1.1
    waves = [np.fft.irfft2(amplitude*np.exp(2j*np.pi*rng.random(amplitude.shape)), (height, width)) for _ in range(3)]
    grey, warm, green = ((wave - wave.mean())/wave.std() for wave in waves)
    pixels = 128 + 50*np.stack([grey + .3*warm, grey - .1*warm + .1*green, grey - .3*green], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, 'jpeg', quality=90)
    return file.getvalue()


class Sometimes:
    "A change of a PIL picture that happens with probability p."

    def __init__(self, p, change):
        self.p, self.change = p, change

    def __call__(self, picture):
        return self.change(picture) if random.random() < self.p else picture


def pil_transforms(size, scale, blur_p, solarise_p):
    "The pipeline of one view as the official code builds it: torchvision's transforms on PIL pictures, PIL's blur."
    from torchvision import transforms as T
    return T.Compose([
        T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(.4, .4, .2, .1)], .8), T.RandomGrayscale(.2),
        Sometimes(blur_p, lambda picture: picture.filter(ImageFilter.GaussianBlur(random.uniform(.1, 2)))),
        Sometimes(solarise_p, ImageOps.solarize), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def files(n, height, width, **strengths):
    "n JPEG files, our recipe and the peer's."
    first, other, local = KINDS
    peer = [pil_transforms(224, *first), pil_transforms(224, *other), *(pil_transforms(96, *local) for _ in range(6))]
    return SimpleNamespace(files=[photograph(height, width, seed) for seed in range(n)], peer=peer, crop=MultiCrop('natural', **strengths))


def from_files(state):
    "What a worker does: bytes in, bytes out. The step normalises them on its device; `alike` does it here."
    return state.crop.from_files(state.files, torch.Generator().manual_seed(0))


def from_pil(state):
    random.seed(0)
    torch.manual_seed(0)
    pictures = [[transform(picture) for transform in state.peer]
                for picture in (Image.open(io.BytesIO(file)).convert('RGB') for file in state.files)]
    return [torch.stack(views) for views in zip(*pictures)]


def alike(ours, theirs, tolerance=.25):
    "Other random numbers, so the same shapes, and the same mean and deviation of the colours in each view."
    for view, (mine, other) in enumerate(zip(MultiCrop().normalise(ours), theirs, strict=True)):
        assert mine.shape == other.shape and mine.dtype == other.dtype, f'view {view}: {mine.shape} {mine.dtype}, {other.shape} {other.dtype}'
        for name in ('mean', 'std'):
            a, b = (getattr(views, name)().item() for views in (mine, other))
            assert abs(a - b) < tolerance, f'{name} of view {view}: {a:.2f}, of the peer {b:.2f}'


def files_floor(state):
    """Decoding and eight crops of middling size, measured here; what a view needs whatever its colours do.

    A JPEG is decoded no finer than needed, so the floor takes the coarsest scale at which a crop of the whole picture still fills a view."""
    least_share = min(1., 224/min(Encoded(state.files[0]).size))
    picture = decode(state.files[0], least=least_share)
    def least(work): return min(_timed(work) for _ in range(5))
    height, width = picture.shape[1:]
    def box(area): return [0, 0, *(min(side, round(math.sqrt(area*height*width))) for side in (height, width))]
    crops = 2*least(lambda: crop_bytes(picture, box(.7), 224)) + 6*least(lambda: crop_bytes(picture, box(.225), 96))
    decoding = sum(least(lambda file=file: decode(file, least=least_share)) for file in state.files[:4])/4
    return len(state.files)*(decoding + crops), f'decoding to {height}x{width} {1e3*decoding:.1f} ms and eight crops {1e3*crops:.1f} ms a picture, measured; no colours, no blur'


def _timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- on whole batches ------------------------------------------------------------------------------------------------

def kornia_views(size=32):
    "kornia's modules for the three kinds of view, in the order of the recipe."
    import kornia.augmentation as K
    def one(scale, blur_p, solarise_p):
        return torch.nn.Sequential(
            K.RandomResizedCrop((size, size), scale, (3/4, 4/3), resample='BICUBIC', cropping_mode='resample', p=1.), K.RandomHorizontalFlip(p=.5),
            K.ColorJitter(.4, .4, .2, .1, p=.8), K.RandomGrayscale(p=.2), K.RandomGaussianBlur((13, 13), (.1, 2.), p=blur_p),
            K.RandomSolarize((.5, .5), (0., 0.), p=solarise_p), K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)))
    first, other, local = (one(*kind) for kind in KINDS)
    return [first, other, *[local]*4]


def batch(n, device):
    "n smooth random pictures of 32x32, our recipe and the peer's."
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = (255*torch.nn.functional.interpolate(coarse, 32, mode='bicubic').clamp(0, 1)).round().byte().to(device)
    return SimpleNamespace(pixels=pixels, crop=MultiCrop('natural', 2, 4, 32, 32), peer=[view.to(device) for view in kornia_views()], device=device)


def batched(state):
    return state.crop(state.pixels, torch.Generator(state.device).manual_seed(0))


def batched_kornia(state):
    torch.manual_seed(0)
    images = state.pixels/255
    return [view(images) for view in state.peer]


def batch_floor(state):
    "Bytes of the pictures read once a view and of the views written once."
    views = len(state.pixels)*state.crop.n_views*state.pixels[0].numel()
    return 5*views/bandwidth(state.device), 'a byte read and a float written for each value of a view, at the bandwidth of a copy; some fifty passes in the cache are not counted'


def views_per_second():
    "Rate on an accelerator: 4096 pictures, six views each, without a peer."
    state = SimpleNamespace(pixels=torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8, device='cuda'), crop=MultiCrop('natural', 2, 4, 32, 32), device='cuda')
    def once():
        torch.cuda.synchronize()
        return _timed(lambda: (batched(state), torch.cuda.synchronize()))
    once()
    seconds = sorted(once() for _ in range(9))[4]
    return {'seconds': {'ours': seconds, 'theirs': None}, 'n': 9,
            'more': {'views per second': {'value': 6*4096/seconds, 'goal': [500_000, math.inf]}}}


PIL = 'torchvision transforms on PIL pictures with PIL blur, as the official code'
KORNIA = 'kornia; one order of the jitter per batch, crops by bicubic sampling without antialiasing'
JPEG = '64 JPEG 400x700 -> 2x224 + 6x96, one thread; ours gives bytes, to be normalised on the device, the peer normalised floats'
SMALL = '32x32, 2 + 4 views, natural'

ROWS = [
    Row(row='views from JPEG', work=JPEG, peer=PIL, prepare=functools.partial(files, 64, 400, 700), ours=from_files, theirs=from_pil,
        agree=alike, floor=files_floor, goal_time=1/3, pairs=7, threads=1),
    Row(row='views from JPEG, hue in YIQ', work=JPEG, peer=PIL, prepare=functools.partial(files, 64, 400, 700, hue_space='yiq'),
        ours=from_files, theirs=from_pil, agree=alike, floor=files_floor, goal_time=1/3, pairs=7, threads=1),
    Row(row='views from large JPEG', work='16 JPEG 1200x1800 -> 2x224 + 6x96, one thread, output as above', peer=PIL, prepare=functools.partial(files, 16, 1200, 1800),
        ours=from_files, theirs=from_pil, agree=functools.partial(alike, tolerance=.4), floor=files_floor, pairs=5, threads=1),
    Row(row='views of batches', work=f'512 images {SMALL}', peer=KORNIA, prepare=functools.partial(batch, 512, 'cpu'), ours=batched,
        theirs=batched_kornia, agree=alike, floor=batch_floor, pairs=7, requires='kornia'),
    Row(row='views of batches on GPU', work=f'4096 images {SMALL}', peer=KORNIA, prepare=functools.partial(batch, 4096, 'cuda'), ours=batched,
        theirs=batched_kornia, agree=alike, floor=batch_floor, goal_time=1/5, pairs=7, device='cuda', requires='kornia'),
    Row(row='rate of views on GPU', work=f'4096 images {SMALL}', peer='none: at least 500,000 views a second', measure=views_per_second, device='cuda'),
]
