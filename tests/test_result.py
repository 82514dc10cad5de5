"""A result on disk: opened without torch, by whatever names, in whatever state."""
import csv
import os

import numpy as np
import pytest
from conftest import python
from PIL import Image
from selfclass.errors import DataError, MissingInputError
from selfclass.result import ClusterResult, load_result, merge_clusters, plane, read_names, regroup, rename_clusters, write_names

HOSTILE = ['plain.png', 'a, b.png', 'say "cheese".png', 'two\nlines.png', '-rf.png', '<img src=x>.png', '=1+1.png', 'sub/猫.png', 'x' * 251 + '.png',
           os.fsdecode(b'latin-\xe9.png')]


@pytest.fixture
def photos(tmp_path):
    "Pictures of hostile names, each of a colour of its own."
    for i, name in enumerate(HOSTILE):
        file = tmp_path/'photos'/name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40 + i, 30), (20 * i, 0, 255 - 20 * i)).save(file)
    return tmp_path/'photos'


def result_of(photos, **more):
    probs = np.random.default_rng(0).dirichlet(np.ones(3), len(HOSTILE))
    return ClusterResult(probs, xy=probs[:, :2], paths=HOSTILE, root=photos, **more)


def test_opening_and_looking_need_no_torch(photos, tmp_path):
    result_of(photos).save(tmp_path/'result')
    code = 'import sys; from selfclass.result import load_result; print(load_result(sys.argv[1]).thumbnails([0, 1]).shape, "torch" in sys.modules, "seaborn" in sys.modules)'
    ran = python('-c', code, tmp_path/'result')
    assert ran.stdout.strip() == '(2, 3, 32, 32) False False', ran.stderr


def test_pictures_of_any_name_are_found_again(photos, tmp_path):
    again = load_result(result_of(photos).save(tmp_path/'result'))
    assert again.paths.tolist() == HOSTILE
    colours = again.thumbnails(slice(None), 16)[:, :, 8, 8]
    assert colours.tolist() == [[20 * i, 0, 255 - 20 * i] for i in range(len(HOSTILE))]
    with (tmp_path/'result'/'labels.csv').open(encoding='utf-8', errors='surrogateescape', newline='') as file:
        assert [(photos/row['path']).is_file() for row in csv.DictReader(file)] == [True] * len(HOSTILE)


def test_missing_pictures_are_tiles_and_moved_ones_are_found(photos, tmp_path):
    result_of(photos).save(tmp_path/'result')
    photos.rename(tmp_path/'moved')
    tiles = load_result(tmp_path/'result').thumbnails([0, 1, 2])
    assert (tiles == tiles[0]).all() and len(np.unique(tiles[0])) == 2          # the same cross
    found = load_result(tmp_path/'result', root=tmp_path/'moved').thumbnails([0, 1, 2])
    assert not (found == tiles).all((1, 2, 3)).any()


def test_an_interrupted_save_is_no_result(photos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('selfclass.result.save_arrays', full)
    with pytest.raises(OSError):
        result_of(photos).save(tmp_path/'result')
    with pytest.raises(MissingInputError, match='no finished result'):
        load_result(tmp_path/'result')


def test_a_folder_that_json_cannot_name_is_refused(tmp_path):
    odd = ClusterResult(np.ones((1, 1)), xy=np.zeros((1, 2)), paths=['a.png'], root=os.fsdecode(os.fsencode(tmp_path) + b'/\xff'))
    with pytest.raises(DataError, match='not valid UTF-8; rename it'):
        odd.save(tmp_path/'result')


@pytest.mark.parametrize('name', ['no', '~', '5', '1e3', 'a: b', '# a', '- a', '"', "it's", '{a}', '猫', 'two words', '!tag', '*star', '%', 'x' * 500])
def test_names_survive_their_file(name, tmp_path):
    result = rename_clusters(ClusterResult(np.eye(3), xy=np.zeros((3, 2))), {1: name})
    assert rename_clusters(ClusterResult(np.eye(3), xy=np.zeros((3, 2))), read_names(write_names(result, tmp_path/'names.yaml'))).names == result.names


def test_pictures_in_no_cluster_keep_their_line(photos, tmp_path):
    result = result_of(photos, cluster=[-1, 0, 1, 2] + [0] * (len(HOSTILE) - 4))
    again = load_result(result.save(tmp_path/'result'))
    assert again.cluster[0] == -1 and again.sizes.sum() == len(HOSTILE) - 1 and (again.confidence[0], again.margin[0]) == (0, 0)
    assert (tmp_path/'result'/'labels.csv').read_text(errors='surrogateescape').splitlines()[1] == 'plain.png,-1,,0.0000,0.0000'
    assert '1 in none' in repr(again)
    with pytest.raises(DataError, match='or be -1'):
        result_of(photos, cluster=[-2] * len(HOSTILE))


def test_no_cell_is_a_formula(photos, tmp_path):
    "A hostile archive brings files that a spreadsheet would run; the path of each still leads to its file."
    result_of(photos, names=['=HYPERLINK("http://x")', '+1', 'plain']).save(tmp_path/'result')
    with (tmp_path/'result'/'labels.csv').open(encoding='utf-8', errors='surrogateescape', newline='') as file:
        rows = list(csv.DictReader(file))
    assert not [cell for row in rows for column, cell in row.items() if cell.startswith(('=', '+', '-', '@', '\t', '\r')) and column in ('path', 'name')]
    assert all((photos/row['path']).is_file() for row in rows) and {row['path'] for row in rows} >= {'./=1+1.png', './-rf.png', 'plain.png'}
    assert load_result(tmp_path/'result').paths.tolist() == HOSTILE and load_result(tmp_path/'result').names[1] == '+1'


def test_merging_keeps_numbers_and_sorts_new_pictures(tmp_path):
    probs = np.random.default_rng(0).dirichlet(np.ones(5), 60).astype(np.float32)
    result = ClusterResult(probs, xy=probs[:, :2], names=['a', 'b', 'c', 'd', 'e'])
    merged = load_result(merge_clusters(result, {3: 1}).save(tmp_path/'result'))
    assert merged.names == ['a', 'b', 'c', 'cluster 3', 'e'] and merged.sizes[3] == 0 and merged.sizes.sum() == 60
    assert np.allclose(merged.probs[:, 1], probs[:, 1] + probs[:, 3], atol=1e-6)
    assert (regroup(result, merged.facts['model clusters'], merged.names).probs == merged.probs).all()
    assert rename_clusters(merged, {4: 'E'}).facts['model clusters'] == [0, 1, 2, 1, 4]


def test_the_plane_keeps_groups_together_beyond_the_anchors():
    rng = np.random.default_rng(0)
    group = rng.integers(0, 4, 1500)
    features = (10 * rng.normal(size=(4, 8))[group] + rng.normal(size=(1500, 8))).astype(np.float32)
    xy = plane(features, anchors=200)
    centres = np.array([np.median(xy[group == g], 0) for g in range(4)])
    nearest = ((xy[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (nearest == group).mean() > .98
    assert (plane(features, anchors=200) == xy).all() and not (plane(features, 1, 200) == xy).all()


def test_fifty_thousand_images(tmp_path):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(20), 50_000).astype(np.float32)
    paths = [f'{i // 1000}/{i}.jpg' for i in range(50_000)]
    again = load_result(ClusterResult(probs, xy=probs[:, :2], paths=paths, root=tmp_path).save(tmp_path/'result'))
    assert (again.probs == probs).all() and again.paths[-1] == '49/49999.jpg' and again.sizes.sum() == 50_000
    assert (tmp_path/'result'/'labels.csv').read_text().count('\n') == 50_001
