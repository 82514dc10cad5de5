"""What `selfclass train` leaves when the machine is taken away at a bad moment, and that the same command goes on from there."""
import pytest
import yaml
from conftest import ROOT
from test_launch import SMALL

from selfclass import cli, train
from selfclass.cli import main, run_state
from selfclass.core import load_json


@pytest.fixture
def give(tmp_path, monkeypatch):
    "The command `train` on made-up shapes, in a folder of its own."
    (tmp_path/'settings.ini').symlink_to(ROOT/'settings.ini')            # checkpoints go below it
    (tmp_path/'small.yaml').write_text(yaml.safe_dump(SMALL | {'linear': {'epochs': 2}, 'datasets': {'shapes': {'source': 'shapes', 'size': 16, 'test': .2}}}))
    monkeypatch.chdir(tmp_path)
    return lambda out, *words: main(['train', '--params', 'small.yaml', '--out', str(out), *words])


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize('module, name, state', [(train, 'save_arrays', 'begun'), (cli, 'score_folder', 'trained'), (cli, 'draw_folder', 'trained'), (cli, 'profile_recipe', 'trained')])
def test_a_run_stopped_at_any_moment_is_finished_by_the_same_command(module, name, state, give, tmp_path, monkeypatch, capsys):
    assert give('whole') == 0, capsys.readouterr().err
    whole = {file: (tmp_path/'whole'/file).read_bytes() for file in ('model.safetensors', 'config.json', 'log.csv', 'predictions.npz', 'embeddings.npz')}
    with monkeypatch.context() as patched:
        patched.setattr(module, name, stop)
        if name == 'save_arrays':               # views.npz is written by it too, before the rest of the run
            patched.setattr(train, 'sample_views', lambda *_: None)
        assert give('stopped') == 130 and run_state(tmp_path/'stopped') == state
    assert give('stopped') == 0, capsys.readouterr().err
    for file, contents in whole.items():
        assert (tmp_path/'stopped'/file).read_bytes() == contents, file
    assert load_json(tmp_path/'stopped'/'scores.json')['scores'] == load_json(tmp_path/'whole'/'scores.json')['scores']
    assert (tmp_path/'stopped'/'index.html').exists() and (tmp_path/'stopped'/'profile.json').exists() and run_state(tmp_path/'stopped') == 'finished'


def test_half_a_run_without_a_checkpoint_is_left_alone(give, tmp_path, capsys):
    (tmp_path/'theirs').mkdir()
    (tmp_path/'theirs'/'config.json').write_text('{}')
    assert give('theirs') == 2 and 'half a run' in capsys.readouterr().err
    assert [file.name for file in (tmp_path/'theirs').iterdir()] == ['config.json']


def test_scores_stay_when_the_images_are_others(give, tmp_path, capsys):
    assert give('run') == 0
    before = {file: file.read_bytes() for file in (tmp_path/'run').rglob('*') if file.is_file()}
    again = lambda *words: main(['evaluate', 'run', '--params', 'small.yaml', *words])
    assert again('--set', 'datasets.shapes.test=0.3') == 2 and 'another training images and held-out images' in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (tmp_path/'run').rglob('*') if file.is_file()} == before
    assert again('--set', 'knn={k: 3}') == 0
    assert load_json(tmp_path/'run'/'scores.json')['evaluation']['knn'] == {'k': 3}
    capsys.readouterr()
    assert give('other', '--seed', '1') == 0 and main(['gather', 'run', 'other', '--out', 'both.json']) == 2 and 'different numbers' in capsys.readouterr().err
    (tmp_path/'other'/'scores.json').write_text('{"dataset": ')
    assert main(['gather', 'run', 'other', '--out', 'both.json']) in (1, 2) and 'is not whole' in capsys.readouterr().err and not (tmp_path/'both.json').exists()
