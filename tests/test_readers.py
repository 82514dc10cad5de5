"""Raw downloads as their authors pack them, in miniature: each recipe's data set, one batch of views, its network, one small step."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from selfclass.augment import MultiCrop
from selfclass.core import read_yaml
from selfclass.data import ImageSet, data_hash, load_images, load_splits, voc_targets, write_digits
from selfclass.errors import DataError, MissingInputError
from selfclass.taxonomy import superclasses
from selfclass.lars import build_optimizer
from selfclass.model import ClusterNet
from selfclass.selfclassifier import NeighbourQueue, make_step

VOC = ('aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant '
       'sheep sofa train tvmonitor').split()


def picture(path, seed=0, size=(40, 50)):
    "A smooth random picture in a file; folders are made."
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


# ---- the six formats -------------------------------------------------------------------------------------------------

def places205(root):
    images = root/'places205'/'data'/'vision'/'torralba'/'deeplearning'/'images256'
    for part, n in (('train', 3), ('val', 1)):
        rows = [(f'{scene}/{part}_{i}.jpg', number) for number, scene in enumerate(('a/abbey', 'a/apartment_building/outdoor', 'z/zoo')) for i in range(n)]
        for seed, (path, _) in enumerate(rows): picture(images/path, seed)
        text(root/'places205'/'trainvalsplit_places205'/f'{part}_places205.csv', ''.join(f'{path} {number}\n' for path, number in rows))


def voc07(root):
    home, shown = root/'voc07'/'VOCdevkit'/'VOC2007', {word: {} for word in VOC}
    for part, names in (('trainval', ['000005', '000007', '000009', '000012']), ('test', ['000001', '000002'])):
        for i, name in enumerate(names):
            main, beside = VOC[3*i + 7 - 7*(part == 'test')], 'chair'
            picture(home/'JPEGImages'/f'{name}.jpg', int(name))
            things = ''.join(f'<object><name>{word}</name><difficult>0</difficult><bndbox><xmin>{a}</xmin><ymin>{a}</ymin><xmax>{b}</xmax><ymax>{b}</ymax></bndbox></object>' for word, a, b in ((beside, 1, 9), (main, 3, 30)))
            text(home/'Annotations'/f'{name}.xml', f'<annotation><filename>{name}.jpg</filename>{things}</annotation>')
            shown[main][name], shown[beside][name] = 1, shown[beside].get(name, 0)
        text(home/'ImageSets'/'Main'/f'{part}.txt', '\n'.join(names) + '\n')
        for word in VOC: text(home/'ImageSets'/'Main'/f'{word}_{part}.txt', ''.join(f'{name} {shown[word].get(name, -1):2}\n' for name in names))


def mini_imagenet(root):
    for part, wnids in (('train', ['n01532829', 'n03908618']), ('val', ['n02981792']), ('test', ['n02110063', 'n04146614'])):
        files = [(f'{wnid}{i:08}.jpg', wnid) for wnid in wnids for i in range(2)]
        for seed, (file, _) in enumerate(files): picture(root/'mini-imagenet'/'images'/file, seed)
        text(root/'mini-imagenet'/f'{part}.csv', 'filename,label\n' + ''.join(f'{file},{wnid}\n' for file, wnid in files))


def fmow(root):
    rows = [('train', 'airport', 0, 'NZL', [5, 10, 20, 30]), ('train', 'zoo', 0, 'FRA', [-4, 0, 30, 99]), ('train', 'zoo', 1, 'XKX', [0, 0, 50, 40]),
            ('train', 'port', 7, 'KEN', [1, 1, 2, 2]), ('val', 'zoo', 2, 'BRA', [10, 10, 20, 20]), ('val', 'port', 3, 'JPN', [10, 5, 8, 30])]
    for seed, (part, use, n, country, box) in enumerate(rows):
        file = picture(root/'fmow'/'fmow-rgb'/part/use/f'{use}_{n}'/f'{use}_{n}_0_rgb.jpg', seed)
        boxes = [{'ID': n, 'category': use, 'box': box}]
        text(file.with_suffix('.json'), json.dumps({'country_code': country, 'gsd': .5, 'bounding_boxes': boxes if n else boxes[0]}))
        text(file.with_name(f'{use}_{n}_0_msrgb.json'), json.dumps({'bounding_boxes': boxes}))          # of the other product, beside it


def adience(root):
    columns = 'user_id original_image face_id age gender x y dx dy tilt_ang fiducial_yaw_angle fiducial_score'.split()
    ages = [['(0, 2)', 'None'], ['(25, 32)', '35'], ['(27, 32)', '(60, 100)'], ['(8, 12)', ''], ['(38, 43)', '(48, 53)']]
    for fold, group in enumerate(ages):
        rows = [[f'{fold}@N03', f'{i}_o.jpg', str(17*fold + i), age, 'f', '0', '0', '9', '9', '-15', '0', '30'] for i, age in enumerate(group)]
        text(root/'adience'/f'fold_{fold}_data.txt', ''.join('\t'.join(row) + '\n' for row in [columns, *rows]))
        for user, image, face, *_ in rows: picture(root/'adience'/'aligned'/user/f'landmark_aligned_face.{face}.{image}', fold)


def objectnet(root):
    home, names = root/'objectnet'/'objectnet-1.0', {'alarm_clock': 'Alarm clock', 'bath_towel': 'Bath towel', 'air_freshener': 'Air freshener'}
    for seed, folder in enumerate(names):
        for i in range(2):
            pixels = np.asarray(Image.open(picture(home/'images'/folder/f'{i}f.png', seed))).copy()
            pixels[[0, -1]] = pixels[:, [0, -1]] = 255, 0, 0
            Image.fromarray(pixels).save(home/'images'/folder/f'{i}f.png')
    text(home/'mappings'/'folder_to_objectnet_label.json', json.dumps(names))


MADE = {'places205': places205, 'voc07': voc07, 'mini-imagenet': mini_imagenet, 'fmow': fmow, 'adience': adience, 'objectnet': objectnet}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('downloads')
    for make in MADE.values(): make(root)
    return root


# ---- recipes, from the files to a step -------------------------------------------------------------------------------

SETS = {   # recipe: images to train and to score on, classes, classes of the scored images
    'places205': (9, 3, ('abbey', 'apartment_building/outdoor', 'zoo'), [0, 1, 2]),
    'voc07': (4, 2, tuple(VOC), [0, 3]),
    'mini-imagenet': (6, 4, ('animals', 'non animals'), [0, 0, 1, 1]),
    'fmow': (4, 2, ('Africa', 'Americas', 'Asia', 'Europe', 'Oceania', 'others'), [2, 1]),
    'adience': (5, 2, ('0-2', '4-6', '8-13', '15-20', '25-32', '38-43', '48-53', '60+'), [5, 6]),
    'objectnet': (6, 6, ('Air freshener', 'Alarm clock', 'Bath towel'), [0, 0, 1, 1, 2, 2])}


@pytest.mark.parametrize('recipe', SETS)
def test_recipe_from_files_to_a_step(recipe, root):
    "The entry of the recipe names its set; its views have the recipe's sizes, its network is built whole, and a narrow one takes a step."
    params = read_yaml(ROOT/'conf'/f'{recipe}.yaml')
    n_train, n_test, class_names, labels = SETS[recipe]
    train, test = load_splits(**params['datasets'][recipe] | {'root': root}, memory_budget=0)
    assert (len(train), len(test), test.class_names, test.labels.tolist()) == (n_train, n_test, class_names, labels)
    assert train.class_names == test.class_names and len(train.labels) == n_train and not train.in_memory

    method = params['methods']['selfclassifier']
    crop = MultiCrop(**method['views'])
    index = np.arange(min(4, len(train)))
    views = crop.normalise(crop.from_files(train.encoded(index), torch.Generator().manual_seed(0)))
    assert [tuple(view.shape) for view in views] == [(len(index), 3, 224, 224)]*2 + [(len(index), 3, 96, 96)]*6

    with torch.device('meta'): whole = ClusterNet(**method['model'])
    assert [next(head.parameters()).shape[0] for head in whole.heads] == method['model']['classes']
    known = len(test.class_names) if recipe in ('voc07', 'mini-imagenet', 'fmow', 'adience') else {'places205': 205, 'objectnet': 313}[recipe]
    assert method['model']['classes'][0] == known
    net = ClusterNet(**method['model'] | dict(backbone='resnet18', hidden=8, dim=4))
    optimizer = build_optimizer(net.parameters(), **method['optimizer'])
    before = [p.clone() for p in net.parameters()]
    loss = make_step(net, NeighbourQueue(8, net.dim), n_global=crop.n_global, **method['loss'])((torch.from_numpy(index), [view[..., ::2, ::2] for view in views]))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))


# ---- what the readers make of each format ----------------------------------------------------------------------------

def test_names_without_superclasses(root):
    assert load_images('mini-imagenet', 'train+val+test', root=root, memory_budget=0).class_names == ('n01532829', 'n02110063', 'n02981792', 'n03908618', 'n04146614')
    land = load_images('fmow', 'train', root=root, memory_budget=0)
    assert land.class_names == ('airport', 'port', 'zoo') and land.labels.tolist() == [0, 1, 2, 2]


def test_boxes_are_the_pictures(root):
    land = load_images('fmow', 'train', root=root, memory_budget=0)
    assert [tuple(image.shape[1:]) for image in land] == [(30, 20), (2, 2), (40, 26), (40, 50)]
    whole = np.asarray(Image.open(land.files[0]))
    assert np.array_equal(land[0].permute(1, 2, 0), whole[10:40, 5:25])
    assert [picture.size for picture in land.encoded(None)] == [(30, 20), (2, 2), (40, 26), (40, 50)]
    held = load_images('fmow', 'train', root=root, size=16)
    assert held.in_memory and held.boxes is None and torch.equal(held.pixels[0], land.thumbnails([0], 16)[0])
    both = load_images('fmow', 'train+val', root=root, memory_budget=0)
    assert torch.equal(both.subset([5, 0])[1], land[0]) and both.boxes.shape == (6, 4)


def test_views_of_boxes_come_from_inside_them(tmp_path):
    "A large JPEG is decoded coarsely, and still nothing from beyond the box is seen."
    pixels = np.zeros((800, 1000, 3), np.uint8)
    pixels[104:696, 208:904] = 255
    Image.fromarray(pixels).save(tmp_path/'a.jpg', quality=95)
    images = ImageSet('boxed', files=(tmp_path/'a.jpg',)*4, boxes=np.tile([112, 216, 688, 896], (4, 1)))
    recipe = MultiCrop('natural', 2, 2, 32, 16, jitter_p=0., blur_p=(0., 0., 0.), solarise_p=(0., 0., 0.))
    assert all(view.min() > 250 for view in recipe.from_files(images.encoded(None), torch.Generator().manual_seed(0)))


def test_no_red_pixel_of_objectnet_is_left(root):
    images = load_images('objectnet', 'test', root=root)
    assert images.size == (38, 48) and images.in_memory
    red = (images.pixels[:, 0] > 250) & (images.pixels[:, 1:].amax(1) < 5)
    assert red.float().mean() < .01
    with pytest.raises(DataError, match="no split 'train'; splits there: test"): load_images('objectnet', 'train', root=root)


def test_largest_object_and_all_objects(root):
    train, targets = load_images('voc07', 'train', root=root), voc_targets('train', root)
    assert [VOC[label] for label in train.labels] == ['cat', 'diningtable', 'motorbike', 'sheep']
    assert targets.shape == (4, 20) and targets.dtype == np.int8 and set(np.unique(targets)) == {-1, 0, 1}
    assert all(targets[i, label] == 1 for i, label in enumerate(train.labels)) and (targets[:, VOC.index('chair')] == 0).all()
    assert voc_targets('test', root).shape == (2, 20)
    alive = load_images('voc07-2', 'train', root=root)
    assert alive.class_names == ('abiotic', 'biotic') and alive.labels.tolist() == [1, 0, 0, 1]


def test_ages(root):
    faces = load_images('adience', 'train', root=root)
    assert [faces.class_names[label] for label in faces.labels] == ['0-2', '25-32', '25-32', '60+', '8-13']
    assert len(load_images('adience', '+'.join(f'fold_{k}' for k in range(5)), root=root)) == 7


def test_the_animals_of_imagenet_come_first():
    "The rule behind mini-imagenet-2, held against the WordNet hierarchy."
    tree = superclasses(2)
    animal = next(i for i, name in enumerate(tree.names) if 'animal' in name)
    covered = np.asarray(tree.assignment)
    assert set(covered[:398]) <= {animal, -1} and animal not in covered[398:]


# ---- what is missing or broken ---------------------------------------------------------------------------------------

GONE = {   # set: a file to take away, what the error says
    'places205': ('trainvalsplit_places205/train_places205.csv', ('imagesPlaces205_resize.tar.gz', 'places.csail.mit.edu')),
    'voc07': ('VOCdevkit/VOC2007/ImageSets/Main/trainval.txt', ('VOCtrainval_06-Nov-2007.tar',)),
    'mini-imagenet': ('val.csv', ('val.csv does not exist', 'Ravi and Larochelle')),
    'fmow': ('fmow-rgb/train/airport/airport_0/airport_0_0_rgb.jpg', ('airport_0_0_rgb.jpg does not exist', 'fMoW-rgb')),
    'adience': ('fold_3_data.txt', ('fold_3_data.txt does not exist', 'aligned.tar.gz')),
    'objectnet': ('objectnet-1.0/mappings/folder_to_objectnet_label.json', ('objectnet-1.0.zip',))}


@pytest.mark.parametrize('name', GONE)
def test_missing_files_say_what_to_fetch(name, tmp_path):
    split = 'test' if name == 'objectnet' else 'train'
    with pytest.raises(MissingInputError) as error: load_images(name, split, root=tmp_path)
    assert str(tmp_path/name) in str(error.value) and 'unpack it there' in str(error.value) and '\n' not in str(error.value)
    MADE[name](tmp_path)
    file, words = GONE[name]
    (tmp_path/name/file).unlink()
    with pytest.raises(MissingInputError) as error: load_images(name, split, root=tmp_path)
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize('name, file, content', [
    ('places205', 'trainvalsplit_places205/val_places205.csv', 'a/abbey/1.jpg\n'),
    ('voc07', 'VOCdevkit/VOC2007/Annotations/000005.xml', '<annotation><object>'),
    ('mini-imagenet', 'test.csv', 'file,class\na.jpg,n01\n'),
    ('fmow', 'fmow-rgb/train/zoo/zoo_1/zoo_1_0_rgb.json', '{"bounding_boxes": ['),
    ('adience', 'fold_0_data.txt', 'user_id\tage\n3\t(0, 2)\n'),
    ('objectnet', 'objectnet-1.0/mappings/folder_to_objectnet_label.json', 'no json'),
])
def test_broken_lists_are_named(name, file, content, tmp_path):
    MADE[name](tmp_path)
    text(tmp_path/name/file, content)
    with pytest.raises(DataError) as error: load_images(name, 'test' if name == 'objectnet' else 'train', root=tmp_path)
    assert file.rsplit('/', 1)[-1] in str(error.value) and 'fetch it again' in str(error.value) and '\n' not in str(error.value)


def test_a_listed_picture_that_is_gone_is_named_when_it_is_read(tmp_path):
    places205(tmp_path)
    images = load_images('places205', 'train', root=tmp_path, memory_budget=0)
    images.files[4].unlink()
    with pytest.raises(DataError, match='train_1.jpg cannot be decoded'): images[4]


# ---- the digits, wherever they are -----------------------------------------------------------------------------------

def test_digits_with_any_root(tmp_path, monkeypatch):
    "A root that has digits gives those, any other root the bundled ones, and without the repository they are scikit-learn's: the same bytes."
    bundled = [data_hash(load_images('digits', split)) for split in ('train', 'test')]
    monkeypatch.chdir(tmp_path)                                    # no settings.ini above: no repository, no data/
    monkeypatch.setenv('SELFCLASS_DATA', str(tmp_path/'elsewhere'))
    for root in (None, tmp_path, str(tmp_path/'nowhere')):
        assert [data_hash(images) for images in load_splits('digits', root=root)] == bundled
    write_digits(tmp_path/'mine'/'digits')
    assert [data_hash(images) for images in load_splits('digits', root=tmp_path/'mine')] == bundled
    own = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for place in ('mine', 'elsewhere'):
        (tmp_path/place/'digits').mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path/place/'digits'/'digits.npz', train_images=own, test_images=own[:2])
    assert np.array_equal(load_images('digits', root=tmp_path/'mine').pixels[:, 0], own)
    assert data_hash(load_images('digits')) == bundled[0]          # the environment variable is for other sets


@pytest.mark.parametrize('name, n_classes', [('objectnet', 313), ('places205', 205), ('voc07', 20), ('mini-imagenet', 2), ('fmow', 6), ('adience', 8)])
def test_the_first_head_of_a_recipe_has_the_classes_of_its_set(name, n_classes):
    assert read_yaml(ROOT/'conf'/f'{name}.yaml')['methods']['selfclassifier']['model']['classes'][0] == n_classes
