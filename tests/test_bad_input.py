"""Each mistake gives one clear line, a non-zero exit code, and loses nothing."""
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, python
from PIL import Image
from selfclass import errors
from selfclass.augment import MultiCrop
from selfclass.core import read_yaml
from selfclass.data import ImageSet, load_images, load_splits, to_pixels
from selfclass.embed import ErrorsAsValues, value_or_raise
from selfclass.errors import DataError, MissingInputError, MissingLabelsError, ParamsError, SelfclassError
from selfclass.metrics import cluster_scores, score_run
from selfclass.run import main, read_params, run_stage, stage_values, use_recipe
from selfclass.selfclassifier import fit_selfclassifier
from selfclass.train import ViewLoader
from torch.utils.data import DataLoader

TINY = dict(model=dict(backbone='convnet', width=4, hidden=8, dim=4, classes=(3,)), views=dict(preset='glyphs', n_local=0, global_size=8),
            optimizer=dict(name='adamw', lr=.01), schedule={}, epochs=1, batch_size=16, device='cpu')
noise = ImageSet('noise', torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8))


def one_line(error, *words):
    text = str(error.value if hasattr(error, 'value') else error)
    assert '\n' not in text and all(word in text for word in words), text


@pytest.mark.parametrize('change, words', [
    (dict(model=TINY['model'] | {'classes': ()}), ('classes',)),
    (dict(model=TINY['model'] | {'classes': (0,)}), ('classes',)),
    (dict(model=TINY['model'] | {'clases': (3,)}), ("did you mean 'classes'",)),
    (dict(model=TINY['model'] | {'backbone': 'resnet81'}), ('resnet18',)),
    (dict(model=TINY['model'] | {'hidden': '8'}), ('hidden', "'8'")),
    (dict(views=dict(preset='glyfs')), ("did you mean 'glyphs'",)),
    (dict(optimizer=dict(name='adam_w', lr=.1)), ("did you mean 'adamw'",)),
    (dict(schedule=dict(warm_up=1)), ("did you mean 'warmup_epochs'",)),
    (dict(loss=dict(row_temperature=.1)), ("did you mean 'row_temp'",)),
    (dict(batch_size=1), ('at least 2', 'found 1')),
])
def test_wrong_numbers(change, words):
    with pytest.raises(ParamsError) as error:
        fit_selfclassifier(noise, **(TINY | change))
    one_line(error, *words)


def test_fewer_images_than_one_batch():
    with pytest.raises(DataError) as error:
        fit_selfclassifier(noise, **(TINY | dict(batch_size=64)))
    one_line(error, '40 images', 'batch of 64')


@pytest.mark.parametrize('section, words', [
    ({'pretain': {'batch_size': 3}}, ("'pretain'", "did you mean 'pretrain'")),
    ({'method': {}}, ("'method'", 'methods')),
])
def test_misspelt_section(section, words, tmp_path):
    (tmp_path/'params.yaml').write_text(json.dumps(read_yaml(ROOT/'params.yaml') | section))
    with pytest.raises(ParamsError) as error:
        read_params(tmp_path/'params.yaml')
    one_line(error, *words)


def test_mistyped_values_are_named_before_a_kernel_starts(scratch, capsys):
    assert main(['pretrain', '--dataset', 'digitz', '--method', 'selfclassifier', '--seed', '0']) == 2
    said = capsys.readouterr().err.strip()
    assert '\n' not in said and "did you mean 'digits'" in said
    assert main(['pretrane']) == 2 and "did you mean 'pretrain'" in capsys.readouterr().err
    assert main(['pretrain', '--dataset', 'digits', '--method', 'selfclassifier']) == 2 and "'seed' has no value" in capsys.readouterr().err
    assert main(['cluster', '--seed', '0']) == 2 and 'no key --seed' in capsys.readouterr().err
    assert not (scratch/'out').exists()


def test_unknown_dataset_and_folders(tmp_path):
    for source, words in (('cifra10', ("did you mean 'cifar10'",)), (str(tmp_path/'missing'), ('missing',)), (str(tmp_path), ('no ',))):
        with pytest.raises((DataError, MissingInputError)) as error:
            load_images(source)
        one_line(error, *words)
    (tmp_path/'broken.png').write_bytes(b'this is no picture')
    with pytest.raises(DataError) as error:
        load_images(tmp_path)[0]
    one_line(error, 'broken.png')


# ---- broken pictures -------------------------------------------------------------------------------------------------

def jpeg(seed, side=160):
    "The bytes of a smooth random photograph."
    file, coarse = io.BytesIO(), np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((side + seed, side), Image.Resampling.BICUBIC).save(file, 'jpeg', quality=90)
    return file.getvalue()


BROKEN = {'cut': jpeg(3)[:700], 'header': jpeg(3)[:150], 'nothing': b'', 'letter': b'Dear reader, this is no picture.', 'half a png': b'\x89PNG\r\n\x1a\n' + b'\0'*40}


def pictures(folder, kind, broken):
    "Eight pictures, the fourth of them broken, as files or in Parquet (packed, or on disk), and what an error should call it."
    contents = [BROKEN[broken] if i == 3 else jpeg(i) for i in range(8)]
    if kind == 'files':
        for i, content in enumerate(contents): (folder/f'{i}.jpg').write_bytes(content)
        return ImageSet('eight', files=tuple(sorted(folder.iterdir()))), '3.jpg'
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    for part in range(2):
        pq.write_table(pa.table({'image': [{'bytes': content, 'path': None} for content in contents[2*part:][:2 + 4*part]]}), folder/f'train-{part:05}-of-00002.parquet')
    from selfclass.data import PackedBytes, ParquetRows
    rows = ParquetRows(sorted(folder.iterdir()), 'image')
    return ImageSet('eight', blobs=PackedBytes.pack(rows) if kind == 'packed' else rows), 'row 1 of '


@pytest.mark.parametrize('broken', BROKEN)
@pytest.mark.parametrize('kind', ['files', 'packed', 'rows'])
def test_broken_pictures_have_a_name(kind, broken, tmp_path):
    "Whole, scaled while it is decoded, cut to a box, in a subset, as views: the same line."
    images, name = pictures(tmp_path, kind, broken)
    boxed = ImageSet('boxed', files=images.files, blobs=images.blobs, boxes=np.tile([1, 1, -1, -1], (8, 1)))
    recipe = MultiCrop('natural', 2, 1, 24, 12)
    for read in (lambda: images[3], lambda: images.encoded([3])[0].pixels(.2), lambda: boxed[3], lambda: boxed.encoded([3])[0].pixels(.2), lambda: images.subset([5, 3])[1],
                 lambda: recipe.from_files(images.subset([7, 3, 1]).encoded(None), torch.Generator().manual_seed(0)), lambda: images.thumbnails([0, 3]), lambda: to_pixels(images, 32)):
        with pytest.raises(DataError) as error: read()
        one_line(error, name, 'cannot be decoded', 'mend or remove it', 'subset(readable(images))')
        assert kind == 'files' or 'train-00001-of-00002.parquet' in str(error.value)


@pytest.mark.parametrize('kind', ['files', 'packed', 'rows'])
@pytest.mark.parametrize('workers', [0, 2])
def test_broken_pictures_in_workers(kind, workers, tmp_path):
    "Type and text survive the way out of a decoding process; errors that travel as values stay one line."
    images, name = pictures(tmp_path, kind, 'cut')
    items = list(DataLoader(ErrorsAsValues(images), batch_size=None, num_workers=workers))          # all of them: the workers end by themselves
    with pytest.raises(DataError) as error: [value_or_raise(item) for item in items]
    one_line(error, name, 'cannot be decoded', 'mend or remove it')
    assert str(error.value).startswith('row 1 of' if kind != 'files' else str(tmp_path))


@pytest.mark.parametrize('workers', [0, 2])
def test_broken_pictures_in_training(workers, tmp_path):
    images, name = pictures(tmp_path, 'files', 'cut')
    loader = ViewLoader(images, MultiCrop('natural', 2, 1, 24, 12), batch_size=4, workers=workers)
    with pytest.raises(DataError) as error: list(loader)
    one_line(error, name, 'mend or remove it')


def test_a_broken_picture_ends_workers_that_are_still_starting(tmp_path):
    "In a process of its own, where a knot of error and loader is untied at the end and every traceback of a worker is seen."
    for name in ('sick', 'first'): (tmp_path/name).mkdir()
    pictures(tmp_path/'sick', 'files', 'cut')
    ran = python('-c', f"""
import gc, pathlib, sys
sys.path.insert(0, {str(ROOT/'tests')!r})
from selfclass.data import load_images
from selfclass.errors import DataError
from selfclass.train import ViewLoader
from workers import Late
def attempt():
    views = Late('natural', 2, 1, 24, 12)
    views.folder = pathlib.Path({str(tmp_path/'first')!r})
    loader = ViewLoader(load_images({str(tmp_path/'sick')!r}, memory_budget=0), views, batch_size=4, workers=2)
    try: list(loader)
    except DataError as error: knot = error
    return str(knot)
if __name__ == '__main__':
    gc.disable()
    print(attempt())
    gc.collect()
""")
    assert ran.returncode == 0 and 'mend or remove it' in ran.stdout and not ran.stderr, ran.stderr[-2000:]


def test_workers_need_few_open_files(tmp_path):
    "Pictures come through a pipe: as tensors each would hold an open file, and the usual limit of a process is 1024."
    for i in range(400): Image.fromarray(np.full((8, 8, 3), i % 250, np.uint8)).save(tmp_path/f'{i:03}.png')
    ran = python('-c', f"""
import resource
from selfclass.data import load_images
from selfclass.embed import uint8_batches
if __name__ == '__main__':
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    print(sum(len(batch) for _, batch in uint8_batches(load_images({str(tmp_path)!r}, memory_budget=0), 200, 1)))
""")
    assert ran.stdout.strip() == '400', ran.stderr[-2000:]


@pytest.mark.parametrize('kind', [getattr(errors, name) for name in errors.__all__])
def test_errors_survive_processes(kind):
    "torch makes the error anew from one string, and processes pickle it."
    error = kind('a.jpg cannot be decoded; mend it')
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == 'a.jpg cannot be decoded; mend it' and type(pickle.loads(pickle.dumps(error))) is kind


def test_labels_that_are_not_there(tmp_path):
    for i in range(10):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path/f'{i}.png')
    train, test = load_splits(str(tmp_path), test=.2)
    assert train.labels is None and test.labels is None and (len(train), len(test)) == (8, 2)
    with pytest.raises(MissingLabelsError) as error:
        cluster_scores(np.zeros(3, int), None)
    one_line(error, 'internal_scores')
    gen = np.random.default_rng(0)
    probs = gen.dirichlet(np.ones(3), 20)
    scores = score_run({f'{split}_{name}': value for split in ('train', 'test') for name, value in
                        {'embeddings': gen.normal(size=(20, 4)), 'probs_0': probs}.items()} | {'classes': np.array([3]), 'head_loss': np.array([.1])})
    assert 'silhouette' in scores and 'acc' not in scores


def test_stage_before_its_inputs(scratch):
    for stage, made_by in (('cluster', 'dvc repro embed'), ('report', 'dvc repro')):
        with pytest.raises(SelfclassError) as error:
            run_stage(stage, {'dataset': 'digits', 'method': 'selfclassifier'} if stage == 'cluster' else {})
        first, last = str(error.value).split('\n')
        assert made_by in first and f'out/notebooks/{stage}' in last
        assert (scratch/last.split(': ')[1]).exists()


def test_recipe_loses_no_edits(scratch):
    (scratch/'params.yaml').unlink()
    (scratch/'params.yaml').write_text('seeds: [42]')
    with pytest.raises(ParamsError, match='not committed'):
        use_recipe('cifar10')
    assert (scratch/'params.yaml').read_text() == 'seeds: [42]'
    shutil.copy(ROOT/'conf'/'digits.yaml', scratch/'params.yaml')
    use_recipe('cifar10')
    assert (scratch/'params.yaml').read_bytes() == (ROOT/'conf'/'cifar10.yaml').read_bytes()


def test_a_wrong_number_in_a_stage_is_one_line_and_its_notebook(scratch):
    params = read_yaml(ROOT/'params.yaml')
    params['methods']['selfclassifier']['model']['classes'] = []
    (scratch/'bad.yaml').write_text(json.dumps(params))
    ran = python('-m', 'selfclass.run', 'pretrain', '--dataset', 'digits', '--method', 'selfclassifier', '--seed', '0', '--params', 'bad.yaml', cwd=scratch)
    lines = ran.stderr.strip().splitlines()
    assert ran.returncode == 1 and 'classes' in lines[-2] and 'out/notebooks/pretrain' in lines[-1], ran.stderr


@pytest.mark.parametrize('section, change, words', [
    ('pretrain', {'batchsize': 3}, ('pretrain.batchsize', "did you mean 'batch_size'")),
    ('pretrain', {'batch_size': '3'}, ('pretrain.batch_size should be int', "'3'")),
    ('methods', {'selfclassifier': {'epoch': 3}}, ('methods.selfclassifier.epoch', "did you mean 'epochs'")),
    ('parallel', {'process': 2}, ('parallel.process', "did you mean 'processes'")),
    ('parallel', {'processes': 0}, ('1 or more processes', 'processes=0')),
    ('datasets', {'digits': {'sorce': 'digits'}}, ('datasets.digits.sorce', "did you mean 'source'")),
])
def test_misspelt_and_mistyped_keys(section, change, words, scratch):
    "Through the cells of the stage itself, without the cost of a kernel."
    from conftest import cells_of, source_of, stage_notebooks
    params = read_yaml(ROOT/'params.yaml')
    for name, value in change.items():
        params[section] = params[section] | ({name: params[section][name] | value} if isinstance(value, dict) and 'sorce' not in value else {name: value})
    code = [source_of(c) for c in cells_of(next(nb for nb in stage_notebooks() if nb.stem == 'pretrain')) if c['cell_type'] == 'code']
    values = stage_values(['dataset', 'method', 'seed', 'data', 'datasets', 'parallel', 'pretrain', 'methods'], dict(dataset='digits', method='selfclassifier', seed=0), params)
    with pytest.raises(ParamsError) as error:
        exec('\n'.join(code[1:5]), values)
    one_line(error, *words)


def test_results_that_cannot_be_written_do_not_cost_the_training(scratch, monkeypatch):
    "The checkpoint stays until the results are on disk."
    from selfclass import train
    run = fit_selfclassifier(noise, **TINY, checkpoints=scratch/'state')
    monkeypatch.setattr(train, 'save_pretrained', lambda *a, **k: (_ for _ in ()).throw(OSError('No space left on device')))
    with pytest.raises(OSError):
        train.save_run(run, scratch/'out')
    assert (scratch/'state'/'last.pt').exists()
    monkeypatch.undo()
    again = fit_selfclassifier(noise, **TINY, checkpoints=scratch/'state')
    assert all(torch.equal(a, b) for a, b in zip(run.net.state_dict().values(), again.net.state_dict().values()))
    train.save_run(again, scratch/'out')
    assert (scratch/'out'/'model.safetensors').exists() and not (scratch/'state').exists()


def test_values_need_their_section():
    with pytest.raises(ParamsError, match="'pretrain' has no value"):
        stage_values(['pretrain'], {}, {})
