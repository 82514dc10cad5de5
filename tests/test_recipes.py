"""Each recipe in conf/ builds: its network, its views, its optimiser, and one step of its loss, with the real keys and sizes on a few made-up images."""
import pytest
import torch
from conftest import ROOT
from selfclass.augment import MultiCrop
from selfclass.core import check_arguments, read_yaml, seed_everything
from selfclass.data import load_splits
from selfclass.lars import build_optimizer, warmup_cosine
from selfclass.model import ClusterNet
from selfclass.probe import knn_probe, linear_probe
from selfclass.selfclassifier import NeighbourQueue, fit_selfclassifier, make_step
from selfclass.transfer import _checked_protocols, crop_views

RECIPES = sorted((ROOT/'conf').glob('*.yaml'))


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
