"""AlexNet in both widths, as SeLa has it: sizes counted by hand, the probes of its five convolutions, files, processes, interruptions."""
import numpy as np
import pytest
import torch
from torch import nn

from selfclass.augment import MultiCrop
from selfclass.data import ImageSet
from selfclass.dist import launch, rank, share_batch_norm
from selfclass.errors import ParamsError
from selfclass.hub import load_pretrained, save_pretrained
from selfclass.model import ALEXNETS, ClusterNet, build_backbone, layer_table
from selfclass.sela import fit_sela
from selfclass.transfer import conv_probes, pooled_maps, probe_layers

# filters, kernel, stride, padding: Asano et al. 2020, section 4.2, and the official code
LAYOUT = {'alexnet': [(96, 11, 4, 2), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1)],
          'alexnet-small': [(64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)]}
SIDES = [55, 27, 13, 13, 13]                        # of the maps at 224 pixels: (224 + 4 - 11) // 4 + 1, then (55 - 3) // 2 + 1, ...


def on_meta(build, *args, **kwargs):
    "Sizes without weights."
    with torch.device('meta'):
        return build(*args, **kwargs)


def small_net(seed=0, **changes):
    torch.manual_seed(seed)
    return ClusterNet(**dict(backbone='alexnet-small', hidden=None, classes=(3,)) | changes)


@pytest.mark.parametrize('name', ALEXNETS)
def test_layers_are_those_of_the_paper(name):
    net, n_features = on_meta(build_backbone, name)
    found = [(m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0]) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert found == LAYOUT[name] and n_features == 4096
    kinds = [type(m).__name__ for m in net.features]
    assert kinds == ['Conv2d', 'BatchNorm2d', 'ReLU', 'MaxPool2d']*2 + ['Conv2d', 'BatchNorm2d', 'ReLU']*3 + ['MaxPool2d']
    assert [type(m).__name__ for m in net.classifier] == ['Dropout', 'Linear', 'ReLU']*2
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [.5, .5]


@pytest.mark.parametrize('name, total', [('alexnet', 58_284_096), ('alexnet-small', 57_006_144)])
def test_parameters_are_as_many_as_by_hand(name, total):
    "Weights and a bias per filter, gain and bias of each norm, two hidden layers on 256 maps of 6 x 6."
    n_in, count = 3, 0
    for n_out, kernel, *_ in LAYOUT[name]:
        count += n_in*kernel*kernel*n_out + n_out + 2*n_out
        n_in = n_out
    count += 256*6*6*4096 + 4096 + 4096*4096 + 4096
    net = on_meta(ClusterNet, name, hidden=None, classes=(3000, 10))
    assert sum(p.numel() for p in net.backbone.parameters()) == count == total
    assert net.dim == net.config['dim'] == 4096 and net.n_parameters == count + 3010*(4096 + 1)
    assert sum(row['parameters'] for row in layer_table(net.backbone, 224, depth=2)) == count


@pytest.mark.parametrize('name, values', [('alexnet', [9600, 9216, 9600, 9600, 9216]), ('alexnet-small', [9216, 9408, 9600, 9216, 9216])])
def test_maps_of_conv1_to_conv5(name, values):
    "Behind each ReLU; pooled to the paper's sizes (A.1) for the large one, and as close from below for the small one."
    net = on_meta(build_backbone, name)[0].eval()
    layers = probe_layers(net)
    assert layers == dict(zip([f'conv{i}' for i in range(1, 6)], [f'features.{i}' for i in (2, 6, 10, 13, 16)]))
    rows = {row['name']: row['shape'] for row in layer_table(net, 224, depth=2)}
    assert [rows[path] for path in layers.values()] == [(spec[0], side, side) for spec, side in zip(LAYOUT[name], SIDES)]
    assert rows['features.17'] == (256, 6, 6) and rows['classifier.5'] == (4096,)
    with pooled_maps(net, layers) as look:
        pooled = look(torch.empty(2, 3, 224, 224, device='meta'))
    assert [m[0].numel() for m in pooled] == values and all(m.shape[2] == m.shape[3] for m in pooled)


def test_probes_have_names_and_read_the_maps_behind_batch_norm():
    "Folding each norm into its convolution, as the paper does before it probes, leaves the maps as they are."
    net = small_net().backbone
    x = torch.randn(8, 3, 70, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        net.train().features(x)                                             # running statistics that are not 0 and 1
        with pooled_maps(net.eval(), probe_layers(net)) as look:
            ours, folded = look(x), x
        for module, norm in zip(net.features, [*net.features[1:], None]):
            if isinstance(module, nn.Conv2d):
                folded = torch.nn.utils.fuse_conv_bn_eval(module, norm)(folded)
            elif isinstance(module, nn.ReLU):
                folded = module(folded)
                torch.testing.assert_close(nn.functional.adaptive_max_pool2d(folded, ours[0].shape[2:]), ours.pop(0), rtol=1e-4, atol=1e-5)
            elif isinstance(module, nn.MaxPool2d):
                folded = module(folded)
    assert not ours


def test_network_from_seed_to_file_and_back(tmp_path):
    "Same seed, same weights; a file gives back the same network; embeddings are unit vectors, and dropout acts in training only."
    net = small_net(5).eval()
    views = [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        z = net.embed(views)
        assert [tuple(v.shape) for v in z] == [(2, 4096)]*2 and tuple(net(views[0])[0].shape) == (2, 3)
        torch.testing.assert_close(z[0].norm(dim=1), torch.ones(2))
        loaded = load_pretrained(save_pretrained(net, tmp_path/'run')).eval()
        assert loaded.config == net.config and list(loaded.state_dict()) == list(net.state_dict())
        assert torch.equal(loaded.embed(views)[1], z[1])
        del loaded
        again = small_net(5)
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
        features = net.features(views[0])
        net.backbone.classifier.train()
        torch.manual_seed(0)
        assert not torch.equal(net.features(views[0]), features)
    first, hidden = net.backbone.features[0], net.backbone.classifier[1]
    assert first.weight.std().item() == pytest.approx((2/(64*11*11))**.5, rel=.02) and hidden.weight.std().item() == pytest.approx(.01, rel=.01)
    assert not first.bias.any() and not hidden.bias.any()


@pytest.mark.parametrize('wrong, says', [
    (dict(backbone='alexnet-smal'), "did you mean 'alexnet-small'"), (dict(backbone='AlexNet'), "did you mean 'alexnet'"),
    (dict(backbone='alexnet', stem='cifar'), "stem='cifar' has no meaning for alexnet"), (dict(backbone='alexnet', width=64), 'the widths of alexnet are fixed')])
def test_errors_name_what_was_meant(wrong, says):
    with pytest.raises(ParamsError) as caught:
        ClusterNet(**dict(hidden=None, classes=(3,)) | wrong)
    assert says in str(caught.value) and '\n' not in str(caught.value)


def test_images_that_are_too_small_are_refused_in_one_line():
    net = on_meta(ClusterNet, 'alexnet', hidden=None, classes=(3,))
    assert net.features(torch.empty(1, 3, 63, 63, device='meta')).shape == (1, 4096)
    for side in (62, 32):
        with pytest.raises(ParamsError, match=f'AlexNet takes images of at least 63 pixels, found {side} x 224; enlarge the views'):
            net.embed([torch.empty(1, 3, side, 224, device='meta')])


def maps_of_a_share(net, x):
    "Maps of this process's images in training mode, its batch norms sharing their statistics, and the running means."
    net = share_batch_norm(net).train()
    with torch.no_grad():
        maps = net.features(x[rank()::2] if len(x) == 4 else x)
    return maps, [m.running_mean for m in net.modules() if hasattr(m, 'running_mean')]


def test_two_processes_share_the_batch_norms():
    "Two images on each of two processes: the maps of the four together. (Dropout, behind them, is drawn by each process.)"
    x, net = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), small_net().backbone
    del net.classifier
    net.train()
    shares = launch(maps_of_a_share, net, x, processes=2)
    with torch.no_grad():
        whole = net.features(x)
    for r, (maps, means) in enumerate(shares):
        torch.testing.assert_close(maps, whole[r::2], rtol=1e-3, atol=1e-4)
        assert len(means) == 5
        for mean, module in zip(means, [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]):
            torch.testing.assert_close(mean, module.running_mean, rtol=1e-4, atol=1e-5)


def coloured(n=8, side=24):
    "Two kinds of pictures, red and blue."
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 80, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    pixels[::2, 0] += 150
    pixels[1::2, 2] += 150
    return ImageSet('coloured', pixels, labels=np.arange(n) % 2)


def test_probes_of_all_stages_score_ten_crops():
    views = MultiCrop(preset='natural', n_local=0, global_size=64)
    scores = conv_probes(small_net(), coloured(), coloured(4), views, epochs=2, batch_size=4, device='cpu')
    assert list(scores) == [f'conv{i}_top1' for i in range(1, 6)] and scores['conv1_top1'] == 1.       # red or blue


def test_interrupted_training_with_dropout_goes_on(tmp_path, monkeypatch):
    "Dropout draws from torch's generator, whose state is a part of the checkpoint: the weights are those of a run in one go."
    from selfclass import sela
    recipe = dict(model=dict(backbone='alexnet-small', hidden=None, classes=(2,)), views=dict(n_global=1, n_local=0, global_size=64), epochs=2, batch_size=4,
                  optimizer=dict(name='sgd', lr=.01, momentum=.9), schedule=dict(drops=(1,)), updates=dict(number=3, warm_start=False), sinkhorn=dict(lam=10.),
                  inputs=dict(train_mode=True), device='cpu')
    whole = fit_sela(coloured(), **recipe)
    save = sela.Checkpoint.save

    def stop(self, epoch):
        save(self, epoch)
        raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(sela.Checkpoint, 'save', stop)
        with pytest.raises(KeyboardInterrupt):
            fit_sela(coloured(), **recipe, checkpoints=tmp_path)
    assert (tmp_path/'last.pt').exists()
    monkeypatch.setattr(sela.Checkpoint, 'save', lambda self, epoch: None)          # one large file is enough
    resumed = fit_sela(coloured(), **recipe, checkpoints=tmp_path)
    assert resumed.record.rows == whole.record.rows and torch.equal(resumed.labels, whole.labels)
    for (name, value), other in zip(whole.net.state_dict().items(), resumed.net.state_dict().values()):
        assert torch.equal(value, other), name
