"""`selfclass cluster` and `selfclass export`, from a folder of pictures to a named table."""
import csv
import os
import re
import shutil
import signal
from configparser import ConfigParser

import numpy as np
import pytest
from conftest import ROOT, python
from PIL import Image
from selfclass.cli import main
from selfclass.result import load_result
from sklearn.datasets import load_digits

SHORT = ('--clusters', '4', '--epochs', '40', '--device', 'cpu')


def write_digits(folder, rows):
    "Digits as grey PNG files of 8 x 8 pixels, in two sub-folders that mean nothing."
    digits = load_digits()
    for i in rows:
        file = folder/('left' if i % 2 else 'right')/f'{i:04}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).save(file)
    return digits.target


def tell(*words):
    "Run a command; its exit code."
    try:
        return main([*map(str, words)])
    except SystemExit as end:
        return end.code


def table(folder):
    with (folder/'labels.csv').open(newline='', encoding='utf-8', errors='surrogateescape') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder of 80 digits beside two files that are no pictures, and its result."
    room = tmp_path_factory.mktemp('made')
    write_digits(room/'photos', range(80))
    (room/'photos'/'broken.png').write_bytes(next((room/'photos'/'left').iterdir()).read_bytes()[:50])
    (room/'photos'/'text.jpg').write_text('no picture')
    assert tell('cluster', room/'photos', '--out', room/'result', *SHORT) == 0
    return room


@pytest.fixture
def room(made, tmp_path):
    "A copy of it that a test may change."
    shutil.copytree(made, tmp_path/'copy')
    result = load_result(tmp_path/'copy'/'result', root=tmp_path/'copy'/'photos')
    result.save(tmp_path/'copy'/'result')
    return tmp_path/'copy'


def test_every_picture_has_its_line(made):
    rows = table(made/'result')
    assert len({row['cluster'] for row in rows}) > 1
    assert list(rows[0]) == ['path', 'cluster', 'name', 'confidence', 'margin']
    assert sorted(row['path'] for row in rows) == sorted(file.relative_to(made/'photos').as_posix() for file in (made/'photos').glob('*/*.png'))
    assert {row['name'] for row in rows} <= {f'cluster {c}' for c in range(4)} and all(0 <= float(row['margin']) <= float(row['confidence']) <= 1 for row in rows)
    assert load_result(made/'result').facts['seed'] == 0


def test_broken_pictures_are_named_and_not_fatal(made):
    with (made/'result'/'skipped.csv').open(newline='') as file:
        skipped = {row['path']: row['reason'] for row in csv.DictReader(file)}
    assert set(skipped) == {'broken.png', 'text.jpg'} and 'no picture' in skipped['text.jpg'] and all(skipped.values())
    assert 'broken.png' in (made/'result'/'report.html').read_text()


def test_nothing_unfinished_is_left_and_the_model_is_ours(made):
    assert sorted(path.name for path in (made/'result').iterdir()) == ['labels.csv', 'model', 'names.yaml', 'report.html', 'result.json', 'result.npz', 'skipped.csv']
    from selfclass.estimator import SelfClassifier
    from selfclass.hub import load_pretrained
    result = load_result(made/'result')
    files = [result.root/path for path in result.paths]
    assert (SelfClassifier.load(made/'result'/'model').predict(files) == result.cluster).all()
    assert 4 in load_pretrained(made/'result'/'model').classes


def test_a_model_is_used_without_training(room, monkeypatch, tmp_path):
    monkeypatch.setattr('selfclass.estimator.fit_heads', None)
    write_digits(tmp_path/'more', range(80, 120))
    assert tell('cluster', tmp_path/'more', '--model', room/'result', '--out', tmp_path/'new', '--device', 'cpu') == 0
    assert len(table(tmp_path/'new')) == 40 and (tmp_path/'new'/'model'/'model.safetensors').is_file()
    assert tell('cluster', room/'photos', '--model', room/'result'/'model', '--out', tmp_path/'same', '--device', 'cpu') == 0
    assert [row['cluster'] for row in table(tmp_path/'same')] == [row['cluster'] for row in table(room/'result')]


@pytest.mark.parametrize(('words', 'said'), [
    (('cluster', 'PHOTOS', '--out', 'NEW'), 'say, for example, --clusters 20'),
    (('cluster', 'NOWHERE', '--out', 'NEW', '--clusters', 4), 'is no folder'),
    (('cluster', 'PHOTOS', '--out', 'RESULT', '--clusters', 4), 'holds a finished result'),
    (('cluster', 'PHOTOS', '--out', 'PHOTOS/text.jpg', '--clusters', 4), 'cannot be made a folder'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--clusters', 0), 'whole number'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--clusters', 4, '--views', 'natrual'), "did you mean 'natural'"),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--clusters', 4, '--names', 'BAD'), 'there is no cluster 9'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--clusters', 4, '--names', 'EMPTY'), 'a letter or more'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--clusters', 4, '--names', 'NOWHERE'), 'is not there'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--model', 'PHOTOS'), 'does not exist'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--model', 'RESULT', '--clusters', 5), 'knows 4 clusters, not 5'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--model', 'RESULT', '--views', 'glyphs'), '--views: with --model nothing is trained'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--model', 'RESULT', '--epochs', 4), '--epochs: with --model'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--model', 'RESULT', '--seed', 0), '--seed: with --model'),
    (('cluster', 'PHOTOS', '--out', 'NEW', '--model', 'RESULT', '--size', 8), '--size: with --model'),
    (('export', 'RESULT', '--session', 'NOWHERE'), 'is not there'),
    (('export', 'RESULT', '--session', 'RESULT/result.json'), 'is not a session of the explorer'),
    (('export', 'PHOTOS'), 'no finished result'),
    (('export', 'RESULT', '--names', 'BAD'), 'there is no cluster 9'),
    (('export', 'RESULT', '--move', 'PHOTOS/text.jpg'), 'is a file'),
])
def test_what_cannot_be_is_said_in_one_line(words, said, made, tmp_path, capsys):
    (tmp_path/'bad.yaml').write_text('9: nine')
    (tmp_path/'empty.yaml').write_text('1: " "')
    places = {'PHOTOS': made/'photos', 'NOWHERE': tmp_path/'nowhere', 'RESULT': made/'result', 'NEW': tmp_path/'new', 'BAD': tmp_path/'bad.yaml', 'EMPTY': tmp_path/'empty.yaml'}
    def placed(word):
        return next((str(word).replace(key, str(place)) for key, place in places.items() if str(word).startswith(key)), word)
    assert tell(*map(placed, words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('selfclass: ') and captured.err.count('\n') == 1 and said in captured.err and not (tmp_path/'new'/'labels.csv').exists()


@pytest.mark.parametrize('words', [(), ('clutser',), ('cluster',), ('cluster', 'a'), ('cluster', 'a', '--out', 'b', '--clusters', 'many'), ('export', 'a', '--move', 'b', '--link', 'c'),
                                   ('cluster', 'a', '--out', 'b', '--workers', '-1'), ('cluster', 'a', '--out', 'b', '--workers', 'two')])
def test_usage_is_code_2(words, capsys):
    assert tell(*words) == 2 and 'usage: selfclass' in capsys.readouterr().err


@pytest.mark.parametrize('command', ['cluster', 'export', 'train', 'evaluate', 'gather', 'weights', 'join'])
def test_help_has_examples_that_the_command_takes(command, capsys):
    assert tell('--help') == 0 and f'{command} ' in capsys.readouterr().out
    assert tell(command, '--help') == 0
    options, _, examples = capsys.readouterr().out.partition('examples:')
    assert f'{command} ' in examples and 'exit codes: 0 done' in examples
    for option in re.findall(r'--[a-z]+', examples):
        assert re.search(rf'(?m)^  {option}\b', options), f'{option} is no option of {command}'


def test_an_option_is_not_guessed(capsys):
    assert tell('cluster', 'a', '--out', 'b', '--cluster', '15') == 2 and '--cluster' in capsys.readouterr().err


def stop_after(epochs, monkeypatch):
    "Press Ctrl-C once the checkpoint of so many epochs is written; the epochs that were trained."
    from selfclass.train import Checkpoint
    save, seen = Checkpoint.save, []

    def saved(self, epoch):
        save(self, epoch)
        seen.append(epoch)
        if len(seen) == epochs:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Checkpoint, 'save', saved)
    return seen


def test_an_interrupted_training_goes_on(made, tmp_path, monkeypatch, capsys):
    seen = stop_after(2, monkeypatch)
    words = 'cluster', made/'photos', '--out', tmp_path/'result', *SHORT
    assert tell(*words) == 130
    assert seen == [0, 1] and 'goes on from the last checkpoint' in capsys.readouterr().err
    assert not (tmp_path/'result'/'result.json').exists() and not (tmp_path/'result'/'labels.csv').exists()
    assert tell(*words) == 0
    assert seen == [*range(40)]                                           # and not from the start
    assert (tmp_path/'result'/'labels.csv').read_bytes() == (made/'result'/'labels.csv').read_bytes()


def test_an_interrupted_report_needs_no_second_training(made, tmp_path, monkeypatch):
    words = 'cluster', made/'photos', '--out', tmp_path/'result', *SHORT

    def stop(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('selfclass.gallery.write_report', stop)
        assert tell(*words) == 130
    monkeypatch.setattr('selfclass.estimator.fit_heads', None)
    assert tell(*words) == 0
    assert (tmp_path/'result'/'labels.csv').read_bytes() == (made/'result'/'labels.csv').read_bytes()


def test_other_numbers_do_not_go_on_from_a_checkpoint(made, tmp_path, monkeypatch):
    seen = stop_after(2, monkeypatch)
    assert tell('cluster', made/'photos', '--out', tmp_path/'result', *SHORT) == 130
    assert tell('cluster', made/'photos', '--out', tmp_path/'result', *SHORT, '--seed', '1') == 0
    assert seen == [0, 1, *range(40)]


def test_overwriting_is_said(room, capsys):
    before = (room/'result'/'result.npz').read_bytes()
    words = 'cluster', room/'photos'/'left', '--out', room/'result', '--model', room/'result', '--device', 'cpu'
    assert tell(*words) == 2
    assert (room/'result'/'result.npz').read_bytes() == before
    assert tell(*words, '--overwrite') == 0
    assert len(load_result(room/'result')) == 40


def test_quiet_without_a_terminal(room, monkeypatch, capsys):
    monkeypatch.delenv('SELFCLASS_PROGRESS', raising=False)
    assert tell('cluster', room/'photos', '--out', room/'result', *SHORT[:2], '--epochs', '2', '--device', 'cpu', '--overwrite') == 0
    captured = capsys.readouterr()
    assert captured.err == '' and '80 pictures in' in captured.out and '2 could not be read' in captured.out and '\r' not in captured.out


def test_names_reach_table_report_and_folders(room, capsys):
    used = sorted({int(row['cluster']) for row in table(room/'result')})
    (room/'names.yaml').write_text(''.join(f'{c}: Sorte {c}/ü <b>\n' for c in used), encoding='utf-8')
    assert tell('export', room/'result', '--names', room/'names.yaml') == 0
    assert {row['name'] for row in table(room/'result')} == {f'Sorte {c}/ü <b>' for c in used}
    page = (room/'result'/'report.html').read_text(encoding='utf-8')
    assert f'Sorte {used[0]}/ü &lt;b&gt;' in page and 'ü <b>' not in page
    assert tell('export', room/'result', '--link', room/'sorted', '--yes') == 0
    assert sorted(path.name for path in (room/'sorted').iterdir()) == sorted(f'Sorte {c}_ü _b_' for c in used)


def test_sorting_is_shown_first(room, capsys):
    content = lambda: {path: path.read_bytes() for path in room.rglob('*') if path.is_file()}
    before = content()
    assert tell('export', room/'result', '--move', room/'sorted') == 0
    said = capsys.readouterr().out
    assert 'would move 80 files' in said and 'no picture was touched' in said and '--yes' in said
    assert content() == before


def test_moving_loses_nothing_and_keeps_the_result_true(room):
    content = sorted(file.read_bytes() for file in (room/'photos').rglob('*.png'))
    pixels = load_result(room/'result').thumbnails(slice(None))
    assert tell('export', room/'result', '--move', room/'sorted', '--yes') == 0
    assert sorted(file.read_bytes() for file in [*(room/'sorted').rglob('*.png'), room/'photos'/'broken.png']) == content
    after = load_result(room/'result')
    assert (after.thumbnails(slice(None)) == pixels).all() and len(table(room/'result')) == 80
    assert all((after.root/row['path']).parent.name == row['name'] for row in table(room/'result'))
    assert tell('export', room/'result', '--move', room/'sorted', '--yes') == 0                  # again: nothing to do
    assert len([*(room/'sorted').rglob('*.png')]) == 80


def test_a_move_that_breaks_off_is_one_line_and_goes_on(room, monkeypatch, capsys):
    link, calls = os.link, []

    def full(*paths):
        calls.append(paths)
        if len(calls) > 30:
            raise OSError(28, 'No space left on device')
        return link(*paths)
    with monkeypatch.context() as patch:
        patch.setattr('selfclass.sorting.os.link', full)
        assert tell('export', room/'result', '--move', room/'sorted', '--yes') == 1
    assert 'No space left' in capsys.readouterr().err and len([*(room/'sorted').rglob('*.png')]) == 30
    result = load_result(room/'result')
    assert all((result.root/path).is_file() for path in result.paths)                           # moved or not, each is where the result says
    assert tell('export', room/'result', '--move', room/'sorted', '--yes') == 0
    assert len([*(room/'sorted').rglob('*.png')]) == 80
    assert len(set((room/'result'/'sorted.csv').read_text().splitlines())) == 81              # the step that failed stands there twice: each is said before it is done


def test_hostile_names_go_the_whole_way(made, tmp_path):
    hostile = ['a, b.png', 'say "cheese".png', 'two\nlines.png', '-rf.png', '<script>alert(1)</script>.png'.replace('/', '∕'), '猫.png', 'x' * 251 + '.png']
    write_digits(tmp_path/'photos', range(20))
    no_text = os.fsdecode(b'latin-\xe9.png')
    shutil.copy(next((tmp_path/'photos'/'left').iterdir()), tmp_path/'photos'/no_text)
    for name, source in zip(hostile, sorted((tmp_path/'photos'/'left').iterdir())):
        source.rename(tmp_path/'photos'/name)
    assert tell('cluster', tmp_path/'photos', '--model', made/'result', '--out', tmp_path/'result', '--device', 'cpu', '--move', tmp_path/'sorted', '--yes') == 0
    assert {os.path.basename(row['path']) for row in table(tmp_path/'result')} >= set(hostile)
    assert b'latin-\xe9.png,' in (tmp_path/'result'/'skipped.csv').read_bytes() and (tmp_path/'photos'/no_text).is_file()
    page = (tmp_path/'result'/'report.html').read_text(encoding='utf-8')
    assert '<script' not in page and '&lt;script&gt;' in page
    assert not load_result(tmp_path/'result').thumbnails(slice(None)).all((1, 2, 3)).any() and len([*(tmp_path/'sorted').rglob('*.png')]) == 20


def test_one_name_for_two_clusters_is_one_class(room, capsys, tmp_path):
    used = np.flatnonzero(load_result(room/'result').sizes)[:2]
    before = load_result(room/'result')
    (room/'names.yaml').write_text(''.join(f'{c}: zebra\n' for c in used))
    assert tell('export', room/'result', '--names', room/'names.yaml') == 0
    assert f'merged {used[0]} and {used[1]} as "zebra"' in capsys.readouterr().out
    after = load_result(room/'result')
    assert after.sizes[used[0]] == before.sizes[used].sum() and after.sizes[used[1]] == 0 and (load_result(room/'result'/'unedited').cluster == before.cluster).all()
    assert tell('export', room/'result', '--names', room/'names.yaml') == 0                       # again: nothing more to merge
    assert 'merged' not in capsys.readouterr().out
    assert tell('export', room/'result', '--link', room/'sorted', '--yes') == 0
    assert len([*(room/'sorted'/'zebra').iterdir()]) == before.sizes[used].sum()
    assert tell('cluster', room/'photos', '--model', room/'result', '--out', tmp_path/'new', '--device', 'cpu') == 0       # new pictures, the same classes
    new = load_result(tmp_path/'new')
    assert new.names == after.names and 'zebra' in {row['name'] for row in table(tmp_path/'new')} and new.sizes[used[1]] == 0
    assert tell('cluster', room/'photos', '--model', tmp_path/'new', '--out', tmp_path/'newer', '--device', 'cpu') == 0    # and from there on
    assert table(tmp_path/'newer') == table(tmp_path/'new')


def test_one_name_for_two_clusters_before_the_training(made, tmp_path, capsys):
    (tmp_path/'names.yaml').write_text('0: all\n1: all\n2: all\n3: all\n')
    assert tell('cluster', made/'photos', '--out', tmp_path/'result', *SHORT[:2], '--epochs', 2, '--device', 'cpu', '--names', tmp_path/'names.yaml') == 0
    assert 'as "all"' in capsys.readouterr().out and {row['name'] for row in table(tmp_path/'result')} == {'all'}


def session_of(folder, edit, file):
    "A file as the explorer saves it."
    from selfclass.curation import curate, save_session
    return save_session(edit(curate(load_result(folder))), file)


def test_edits_of_the_explorer_reach_everything(room, capsys, tmp_path):
    result = load_result(room/'result')
    one, two = np.flatnonzero(result.sizes)[:2]
    wrong, moved = np.flatnonzero(result.cluster == one)[:2].tolist()

    def edit(curation):
        return curation.do('rename', cluster=one, name='horse').do('reject', images=[wrong]).do('move', images=[moved], cluster=two).do('gather', images=[moved + 1], name='odd one')
    session = session_of(room/'result', edit, room/'result'/'curated'/'session.json')
    assert tell('export', room/'result', '--session', session) == 0
    assert ', 1 in none' in capsys.readouterr().out
    rows, after = table(room/'result'), load_result(room/'result')
    assert (rows[wrong]['cluster'], rows[wrong]['name'], rows[moved]['name'], rows[moved]['confidence']) == ('-1', '', result.names[two], '1.0000')
    assert rows[moved + 1]['name'] == 'odd one' and 'horse' in {row['name'] for row in rows}
    assert 'horse' in (room/'result'/'report.html').read_text() and 'horse' in (room/'result'/'names.yaml').read_text() and "marked as wrong" in (room/'result'/'report.html').read_text()
    again = session_of(room/'result'/'unedited', lambda curation: edit(curation).do('rename', cluster=two, name='cow'), session)      # gone on with
    assert tell('export', room/'result', '--session', again) == 0
    assert load_result(room/'result').names == ['cow' if name == result.names[two] else name for name in after.names]
    (tmp_path/'names.yaml').write_text('cow: horse')
    assert tell('export', room/'result', '--session', again, '--names', tmp_path/'names.yaml', '--move', room/'sorted', '--yes') == 0
    assert 'as "horse"' in capsys.readouterr().out
    assert (room/'photos'/result.paths[wrong]).is_file() and sorted(path.name for path in (room/'sorted').iterdir()) == sorted({row['name'] for row in table(room/'result')} - {''})
    assert tell('export', room/'result', '--session', again) == 0                          # after the move, too
    final = load_result(room/'result')
    assert final.names == load_result(room/'result').names and not (final.thumbnails(slice(None)) == final.thumbnails([0])[0]).all()
    assert all((final.root/path).is_file() for path in final.paths)


def test_a_session_of_another_result_is_refused(room, capsys):
    session = session_of(room/'result', lambda curation: curation.do('rename', cluster=0, name='horse'), room/'session.json')
    shutil.copytree(room/'result'/'model', room/'model')
    assert tell('cluster', room/'photos'/'left', '--model', room/'model', '--out', room/'other', '--device', 'cpu') == 0
    before = (room/'other'/'result.json').read_bytes()
    assert tell('export', room/'other', '--session', session) == 2 and 'belongs to another clustering' in capsys.readouterr().err
    assert (room/'other'/'result.json').read_bytes() == before


def test_names_of_a_result_go_with_its_model(room, tmp_path):
    used = np.flatnonzero(load_result(room/'result').sizes)
    (room/'names.yaml').write_text(''.join(f'{c}: Sorte {c}\n' for c in used))
    assert tell('export', room/'result', '--names', room/'names.yaml') == 0
    assert tell('cluster', room/'photos', '--model', room/'result', '--out', tmp_path/'new', '--device', 'cpu') == 0
    assert table(tmp_path/'new') == table(room/'result')
    assert tell('cluster', room/'photos', '--model', room/'result'/'model', '--out', tmp_path/'plain', '--device', 'cpu') == 0       # a model alone knows no names
    assert {row['name'] for row in table(tmp_path/'plain')} == {f'cluster {c}' for c in used}
    (room/'more.yaml').write_text(f'Sorte {used[0]}: other\n')
    assert tell('cluster', room/'photos', '--model', room/'result', '--out', tmp_path/'named', '--names', room/'more.yaml', '--device', 'cpu') == 0
    assert 'other' in {row['name'] for row in table(tmp_path/'named')}


def test_the_size_of_a_result_goes_with_its_model(made, tmp_path):
    assert tell('cluster', made/'photos', '--out', tmp_path/'result', *SHORT[:2], '--epochs', 2, '--device', 'cpu', '--size', 6) == 0
    assert tell('cluster', made/'photos', '--out', tmp_path/'new', '--model', tmp_path/'result', '--device', 'cpu') == 0
    assert (load_result(tmp_path/'new').probs == load_result(tmp_path/'result').probs).all()


def test_workers_reach_the_estimator(room, tmp_path, monkeypatch):
    from selfclass import cli, estimator
    seen = []
    embed = estimator.embed_images
    monkeypatch.setattr(estimator, 'embed_images', lambda *args, **more: seen.append(more['workers']) or embed(*args, **{**more, 'workers': 0}))
    words = 'cluster', room/'photos', '--model', room/'result', '--device', 'cpu', '--out'
    assert tell(*words, tmp_path/'a', '--workers', 3) == 0 and tell(*words, tmp_path/'b') == 0
    assert seen == [3, 0]
    from selfclass.estimator import SelfClassifier
    assert SelfClassifier.load(tmp_path/'a'/'model').workers == 0                              # of this machine, not of the model
    monkeypatch.setattr(cli.os, 'sched_getaffinity', lambda pid: range(4), raising=False)
    pile = type('Pile', (), {'in_memory': False, '__len__': lambda self: 5000})()
    assert cli.decoding_workers(pile) == 3


def test_links_in_the_pile_lead_to_their_pictures_after_a_move(made, tmp_path):
    photos = tmp_path/'photos'
    write_digits(photos, range(20))
    write_digits(tmp_path/'elsewhere', range(20, 22))
    (photos/'second.png').symlink_to('right/0000.png')
    (photos/'outside.png').symlink_to('../elsewhere/right/0020.png')
    (photos/'album').symlink_to('../elsewhere/left')
    content = {path: (photos/path).read_bytes() for path in ('second.png', 'outside.png', 'album/0021.png')}
    assert tell('cluster', photos, '--model', made/'result', '--out', tmp_path/'result', '--device', 'cpu', '--move', tmp_path/'sorted', '--yes') == 0
    result = load_result(tmp_path/'result')
    assert len(result) == 23 and not (result.thumbnails(slice(None)) == result.thumbnails([0])[0]).all((1, 2, 3)).all()
    found = {os.path.basename(path): (result.root/path).read_bytes() for path in result.paths}
    assert all(found[os.path.basename(path)] == data for path, data in content.items())
    assert len([*(tmp_path/'elsewhere').rglob('*.png')]) == 2 and sum(path.is_symlink() for path in (tmp_path/'sorted').rglob('*.png')) == 3
    assert not (photos/'second.png').is_symlink()


def test_the_command_is_installed():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini')
    code = 'import setuptools, sys; sys.argv = ["setup.py", "--name"]; setuptools.setup = lambda **k: print(*k["entry_points"]["console_scripts"])\nexec(open("setup.py").read())'
    assert python('-c', code).stdout.strip() == ini['DEFAULT']['console_scripts'] == 'selfclass=selfclass.cli:main'


@pytest.mark.long
def test_from_png_files_of_digits_to_a_named_table(tmp_path):
    "The path of a new user: pictures without labels, one command, names by looking, a table."
    target = write_digits(tmp_path/'photos', range(1797))
    assert tell('cluster', tmp_path/'photos', '--clusters', '10', '--out', tmp_path/'result', '--device', 'cpu') == 0
    result = load_result(tmp_path/'result')
    true = target[[int(os.path.basename(path)[:-4]) for path in result.paths]]
    seen = {c: int(np.bincount(true[result.cluster == c]).argmax()) for c in range(10)}           # what a person sees in each cluster
    (tmp_path/'names.yaml').write_text(''.join(f'{c}: "{digit}"\n' for c, digit in seen.items()))
    assert tell('export', tmp_path/'result', '--names', tmp_path/'names.yaml') == 0
    right = np.mean([row['name'] == str(target[int(os.path.basename(row['path'])[:-4])]) for row in table(tmp_path/'result')])
    assert right > .9 and (tmp_path/'result'/'report.html').stat().st_size < 5e6


def test_a_move_that_was_killed_is_settled_by_its_record(room, monkeypatch):
    "The program ends between two files and writes nothing more: the next export finds the pictures by sorted.csv."
    from selfclass import cli
    pixels = load_result(room/'result').thumbnails(slice(None))
    with monkeypatch.context() as patch:
        patch.setattr(cli, 'settled_result', lambda result, record: result)
        assert tell('export', room/'result', '--move', room/'killed', '--yes') == 0
    assert not (load_result(room/'result').thumbnails(slice(None)) == pixels).all()
    assert tell('export', room/'result') == 0
    after = load_result(room/'result')
    assert (after.thumbnails(slice(None)) == pixels).all() and all('killed' in row['path'] for row in table(room/'result'))
