"""Each recipe in conf/ builds: its network, its views, its optimiser, and one step of its loss, with the real keys and sizes on a few made-up images."""
import numpy as np
import pytest
import torch
from conftest import ROOT
from selfclass.augment import MultiCrop
from selfclass.core import check_arguments, read_yaml, seed_everything
from selfclass.data import ImageSet, load_splits
from selfclass.kmeans import derive_kmeans
from selfclass.lars import build_optimizer, warmup_cosine
from selfclass.model import ClusterNet
from selfclass.probe import knn_probe, linear_probe
from selfclass.scan import fit_scan
from selfclass.sclre import fit_crossentropy, fit_sclre
from selfclass.sela import collect_embeddings, fit_sela, step_rate, update_steps
from selfclass.selfclassifier import NeighbourQueue, fit_selfclassifier, make_step
from selfclass.taxonomy import superclasses, with_superclasses
from selfclass.transfer import _checked_protocols, crop_views


def recipes_of(method):
    "Recipes with an entry of this name in their section `methods:`."
    return [file for file in sorted((ROOT/'conf').glob('*.yaml')) if method in read_yaml(file)['methods']]


RECIPES, SELA, SCAN, SCLRE = map(recipes_of, ('selfclassifier', 'sela', 'scan', 'sclre'))          # the digits have one entry of each under other names
EVERY = sorted((ROOT/'conf').glob('*.yaml'))


@pytest.mark.parametrize('file', RECIPES, ids=lambda f: f.stem)
def test_recipe_builds_and_takes_a_step(file):
    params = read_yaml(file)
    recipe = params['methods']['selfclassifier']
    check_arguments(fit_selfclassifier, params['pretrain'] | recipe, 'methods.selfclassifier')
    seed_everything(0)
    crop = MultiCrop(**recipe['views'])
    net = ClusterNet(**check_arguments(ClusterNet, recipe['model'], 'model')).to(memory_format=torch.channels_last)
    size = crop.options['global_size']
    images = torch.randint(0, 256, (4, 3, size + 7, size + 3), dtype=torch.uint8)
    views = crop(images, torch.Generator().manual_seed(0))
    assert len(views) == crop.n_views and all(view.shape[-1] in (size, crop.options['local_size']) for view in views)
    optimizer = build_optimizer(net.parameters(), **recipe['optimizer'])
    queue = NeighbourQueue(8, net.dim) if recipe.get('queue') else None
    before = [p.clone() for p in net.parameters()]
    loss = make_step(net, queue, n_global=crop.n_global, **recipe.get('loss', {}))((torch.arange(4), views))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and loss > 0
    assert sum(not torch.equal(a, b) for a, b in zip(before, net.parameters())) > .9 * len(before), 'the step moves the weights'


@pytest.mark.parametrize('file', RECIPES, ids=lambda f: f.stem)
def test_recipe_sections_fit_their_functions(file):
    params = read_yaml(file)
    recipe = params['methods']['selfclassifier']
    for name, entry in params['datasets'].items():
        check_arguments(load_splits, entry | params['data'], f'datasets.{name}')
    check_arguments(linear_probe, params['linear'], 'linear')
    check_arguments(knn_probe, params['knn'], 'knn')
    for numbers in _checked_protocols(params['probe']).values():
        assert crop_views(MultiCrop(**recipe['views']), **numbers.get('crops', {})).n_views == 1
    schedule = check_arguments(warmup_cosine, recipe['schedule'], 'schedule')
    lr = [warmup_cosine(e, recipe['epochs'], recipe['optimizer']['lr'], **schedule) for e in (0, schedule.get('warmup_epochs', 0), recipe['epochs'])]
    assert lr[1] == pytest.approx(recipe['optimizer']['lr']) and lr[2] == pytest.approx(schedule.get('final_lr', 0.), abs=1e-12)


@pytest.mark.parametrize('epochs', [100, 200, 400, 800])
def test_imagenet_recipe_holds_the_published_numbers(epochs):
    "Self-Classifier, sections 5.1-5.3 and the official scripts."
    params = read_yaml(ROOT/'conf'/f'imagenet-{epochs}ep.yaml')
    recipe = params['methods']['selfclassifier']
    assert recipe['epochs'] == epochs and params['pretrain']['batch_size'] == 4096 and recipe['queue'] == 2**18
    assert recipe['model'] == dict(backbone='resnet50', stem='imagenet', hidden=4096, batch_norm=True, dim=128, classes=[1000, 2000, 4000, 8000], fixed_classifier=False)
    assert recipe['loss'] == dict(row_temp=.1, col_temp=.05)
    views = MultiCrop(**recipe['views'])
    assert (views.n_global, views.n_views, views.options['global_size'], views.options['local_size']) == (2, 8, 224, 96)
    lr, start, final = (3.2, .2, .0032) if epochs == 800 else (4.8, .3, .0048)
    assert recipe['optimizer'] == dict(name='lars', lr=lr, momentum=.9, weight_decay=1e-6, trust_coefficient=.001)
    assert recipe['schedule'] == dict(warmup_epochs=10, start_lr=start, final_lr=final)
    assert params['linear']['lr'] == .8 and params['linear']['epochs'] == 100 and params['knn'] == dict(k=20, temperature=.1)
    linear, semi = params['probe']['linear_eval'], params['probe']['semi_supervised']
    assert (linear['lr'], linear['epochs'], linear['batch_size'], linear['momentum'], linear['standardize']) == (.8, 100, 4096, .9, False)
    assert (semi['shares'], semi['lr'], semi['head_lr'], semi['drops'], semi['factor']) == ([.01, .1], [.02, .01], [5., .2], [12, 16], .2)


def sela_entry(params):
    "The entry of the method without the name of its module."
    return {name: value for name, value in params['methods']['sela'].items() if name != 'module'}


@pytest.mark.parametrize('file', SELA, ids=lambda f: f.stem)
def test_sela_recipe_trains(file):
    "Network, views and every number of the recipe, on four made-up images: one step, the look at all images and the renewal before it, and the renewal at the end."
    params = read_yaml(file)
    recipe = check_arguments(fit_sela, params['pretrain'] | sela_entry(params), 'methods.sela')
    with torch.device('meta'):
        net = ClusterNet(**check_arguments(ClusterNet, recipe['model'], 'model'))
    assert net.dim == net.n_features == recipe['model']['dim'] and not list(net.projector.parameters())
    pixels = torch.randint(0, 256, (4, 3, 64, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    narrow = recipe | dict(model=recipe['model'] | {'classes': (2,)*min(2, len(net.classes))}, epochs=1, batch_size=4, workers=0, device='cpu')
    run = fit_sela(ImageSet('made up', pixels), **narrow)
    torch.manual_seed(0)
    drawn = ClusterNet(**narrow['model']).state_dict()
    moved = [not torch.equal(value, drawn[name]) for name, value in run.net.state_dict().items() if value.is_floating_point()]
    assert sum(moved) > .9*len(moved), 'the step moves the weights'
    assert np.isfinite(run.head_loss).all() and run.record.rows[0]['loss'] > 0
    heads = [line['head'] for line in run.diary]
    assert heads == ([0, 1] if recipe['updates']['in_turn'] else [*range(len(run.labels))]*2)
    assert run.loader.views.n_views == 1 and run.loader.views.options['global_size'] == 224


@pytest.mark.parametrize('file', SELA, ids=lambda f: f.stem)
def test_sections_of_sela_recipes_fit_their_functions(file):
    params = read_yaml(file)
    recipe = sela_entry(params)
    for name, entry in params['datasets'].items():
        check_arguments(load_splits, entry | params['data'], f'datasets.{name}')
    check_arguments(linear_probe, params['linear'], 'linear')
    check_arguments(knn_probe, params['knn'], 'knn')
    check_arguments(collect_embeddings, recipe['inputs'], 'inputs')
    kmeans = dict(params['derive']['kmeans'])
    assert kmeans.pop('from') == 'out/embed/sela' and kmeans['n_clusters'][1] == 1.5*kmeans['n_clusters'][0]
    check_arguments(derive_kmeans, kmeans, 'derive.kmeans', supplied=('train', 'test', 'source', 'folder', 'seed'))
    for numbers in _checked_protocols(params['probe']).values():
        assert crop_views(MultiCrop(**recipe['views']), **numbers.get('crops', {})).n_views == 1
    epochs, lr = recipe['epochs'], recipe['optimizer']['lr']
    rates = [step_rate(epoch, lr, **recipe['schedule']) for epoch in (0, *recipe['schedule']['drops'], epochs)]
    assert rates == pytest.approx([lr, .1*lr, .01*lr, .01*lr]) and recipe['schedule']['drops'][-1] < epochs
    times = update_steps(1000*epochs, recipe['updates']['number'], recipe['updates']['power'], recipe['updates']['first'])
    assert len(times) == recipe['updates']['number'] and (times[0], times[-1]) == (0, 1000*epochs)


@pytest.mark.parametrize('name, backbone, classes, number', [('alexnet', 'alexnet', [3000]*10, 100), ('resnet50', 'resnet50', [3000], 80)])
def test_sela_on_imagenet_holds_the_published_numbers(name, backbone, classes, number):
    "Asano et al. 2020, section 4.2, Table 1 (rows e and g) and appendix A.1; what the paper leaves open is the official code's."
    params = read_yaml(ROOT/'conf'/f'sela-imagenet-{name}.yaml')
    recipe = params['methods']['sela']
    assert (recipe['model']['backbone'], recipe['model']['classes'], recipe['model']['hidden']) == (backbone, classes, None)
    assert recipe['epochs'] == 400 and params['pretrain']['batch_size'] == 256 and recipe['sinkhorn']['lam'] == 25
    assert recipe['optimizer'] == dict(name='sgd', lr=.05, momentum=.9, weight_decay=1e-5) and recipe['schedule'] == dict(drops=[150, 300], factor=.1)
    assert recipe['updates'] == dict(number=number, power=2., first=0, in_turn=False, warm_start=False) and recipe['inputs'] == dict(passes=1, train_mode=True)
    views = MultiCrop(**recipe['views']).options
    assert [views[key] for key in ('global_scale', 'jitter_p', 'brightness', 'contrast', 'saturation', 'hue', 'grayscale_p')] == [(.08, 1.), 1., .4, .4, .4, .4, .2]
    probe = params['probe']['conv_probes']
    assert [probe[key] for key in ('epochs', 'lr', 'drops', 'factor', 'batch_size')] == ([36, .01, [5, 15, 25], .2, 192] if name == 'alexnet' else [146, .1, [85, 128], .1, 1024])


@pytest.mark.parametrize('name, epochs', [('cifar10', 400), ('cifar100', 400), ('cifar100-20', 400), ('stl10', 200)])
def test_sela_on_small_images_holds_the_numbers_of_the_code(name, epochs):
    "The CIFAR script of the official code; STL-10 has half of its epochs and renewals, for twice the images."
    params = read_yaml(ROOT/'conf'/f'sela-{name}.yaml')
    recipe = params['methods']['sela']
    assert (recipe['model']['backbone'], recipe['model']['classes']) == ('alexnet', [128]*10)
    assert params['pretrain']['batch_size'] == 128 and recipe['epochs'] == recipe['updates']['number'] == epochs
    assert (recipe['updates']['power'], recipe['updates']['in_turn'], recipe['sinkhorn']['lam']) == (1., True, 10.)
    assert recipe['optimizer'] == dict(name='sgd', lr=.03, momentum=.9, weight_decay=5e-4) and recipe['schedule'] == dict(drops=[epochs*3//5, epochs*4//5], factor=.1)
    assert recipe['views']['global_scale'] == [.2, 1.] and list(params['datasets']) == [name] and params['knn']['k'] == 10


@pytest.mark.parametrize('file', EVERY, ids=lambda f: f.stem)
def test_every_entry_fits_its_function(file):
    "All methods of a params file, and all that start from a run: keys, types, and the sections of the phases of SCAN."
    from selfclass import scan
    from selfclass.train import method_function
    params = read_yaml(file)
    for name, entry in params['datasets'].items():
        check_arguments(load_splits, entry | params['data'], f'datasets.{name}')
    for section in ('methods', 'derive'):
        for name, entry in params[section].items():
            numbers = {key: value for key, value in entry.items() if key not in ('module', 'fit', 'from')}
            fit = method_function(name, entry, section)
            supplied = ('train', 'test', 'source', 'folder') if section == 'derive' else ('images', *params['pretrain'])
            check_arguments(fit, numbers, f'{section}.{name}', supplied=supplied)
            if entry.get('module', name) == 'scan':
                scan._checked_phase(scan._clustering, entry['clustering'], 'clustering')
                scan._checked_phase(scan._selflabel, entry['selflabel'], 'selflabel')
                if 'pretext' in entry: scan._checked_pretext(entry['pretext'])


def made_up(n, size, **rest):
    "Noise in the place of pictures."
    return ImageSet('made up', torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), **rest)


@pytest.mark.parametrize('file', [file for file in SCAN if file.stem != 'digits'], ids=lambda f: f.stem)
def test_scan_recipe_trains(file):
    "Network, views and every number of the recipe, one step of each phase; the threshold alone is one that noise passes."
    params = read_yaml(file)
    entry = {name: value for name, value in params['methods']['scan'].items() if name != 'module'}
    short = {phase: entry[phase] | dict(epochs=1, batch_size=4) for phase in ('pretext', 'clustering', 'selflabel')}
    short['selflabel']['threshold'] = .01
    narrow = entry | short | dict(neighbours=entry['neighbours'] | dict(k=2), batch_size=4, device='cpu')
    run = fit_scan(made_up(2*max(entry['model']['classes']), entry['views']['global_size']), **narrow)
    assert np.isfinite(run.head_loss).all() and run.net.classes == tuple(entry['model']['classes'])
    assert run.loader.views.options['global_size'] == entry['views']['global_size']


@pytest.mark.parametrize('name, epochs, batch, entropy', [('cifar10', 50, 128, 5.), ('cifar100-20', 100, 512, 5.), ('stl10', 100, 128, 5.)])
def test_scan_on_small_images_holds_the_numbers_of_the_code(name, epochs, batch, entropy):
    params = read_yaml(ROOT/'conf'/f'scan-{name}.yaml')
    entry = params['methods']['scan']
    assert (entry['clustering']['epochs'], entry['clustering']['batch_size'], entry['clustering']['entropy_weight']) == (epochs, batch, entropy)
    assert (entry['pretext']['epochs'], entry['pretext']['temp'], entry['neighbours']['k'], entry['selflabel']['threshold']) == (500, .1, 20, .99)
    assert list(params['datasets']) == [name] and params['report']['method'] == 'scan' and params['derive']['kmeans']['from'] == 'out/embed/scan'


@pytest.mark.parametrize('n', [50, 100, 200])
def test_scan_on_imagenet_holds_the_numbers_of_the_code(n):
    entry = read_yaml(ROOT/'conf'/f'scan-imagenet-{n}.yaml')['derive']['scan']
    assert entry['classes'] == [n]*10 and entry['neighbours'] == dict(k=50, features='backbone') and entry['batch_size'] == (512 if n == 50 else 1024)
    assert (entry['clustering']['entropy_weight'], entry['clustering']['optimizer']['lr'], entry['selflabel']['epochs']) == (5., 5., 25)


@pytest.mark.parametrize('method', ['sclre', 'crossentropy'])
@pytest.mark.parametrize('file', SCLRE, ids=lambda f: f.stem)
def test_sclre_recipe_trains(file, method):
    "Network, views, superclasses and every number of the recipe on images of all hundred classes, one epoch of two steps."
    params = read_yaml(file)
    entry = {name: value for name, value in params['methods'][method].items() if name not in ('module', 'fit')}
    fine = superclasses(entry['superclasses']).leaf_names
    images = with_superclasses(made_up(100, 32, labels=np.arange(100), class_names=fine), entry['superclasses'])
    small = entry | dict(model=entry['model'] | dict(backbone='resnet18'), epochs=1, batch_size=50, device='cpu', **({'attention': entry['attention'] | dict(reference=7)} if method == 'sclre' else {}))
    small['views'] = entry['views'] | dict(global_size=32)
    run = (fit_sclre if method == 'sclre' else fit_crossentropy)(images, **small)
    assert run.net.classes == (int(file.stem.rsplit('-', 1)[1]),) and np.isfinite(run.head_loss).all()
    assert (entry['epochs'], entry['optimizer']['lr'], params['pretrain']['batch_size'], entry['views']['global_size']) == (200, .001, 64, 64)
