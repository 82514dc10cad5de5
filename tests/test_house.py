"""The repository as a whole."""
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser

import pytest
from conftest import ROOT, python

needs_git = pytest.mark.skipif(not (ROOT/'.git').exists(), reason='not a git checkout')


@needs_git
def test_no_large_file_is_tracked():
    names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True).stdout.split('\0')[:-1]
    large = [name for name in names if (ROOT/name).is_file() and (ROOT/name).stat().st_size > 512_000]
    assert not large, large


def test_wheel_builds_installs_and_imports(tmp_path):
    source = tmp_path/'source'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns('.git', '.venv', 'out', '.dvc', '.checkpoints', 'nbs', 'build', '*.egg-info', 'data', 'datastore'))
    built = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob('*.whl'))
    names = zipfile.ZipFile(wheel).namelist()
    assert 'selfclass/py.typed' in names and 'selfclass/loss.py' in names and not [n for n in names if n.startswith(('tests', 'nbs'))]
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path/'site', wheel], check=True, capture_output=True)
    ran = python('-c', 'import selfclass; print(selfclass.__version__, selfclass.__file__)', cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini')
    assert ran.stdout.split()[0] == ini['DEFAULT']['version'] and str(tmp_path/'site') in ran.stdout, ran.stderr


def test_readme_is_made_from_its_notebook(tmp_path):
    made = python('-m', 'jupyter', 'nbconvert', '--log-level=ERROR', '--to', 'markdown', '--output-dir', tmp_path, '--output', 'README', ROOT/'nbs'/'index.ipynb')
    assert made.returncode == 0, made.stderr
    assert (tmp_path/'README.md').read_text().replace('(../', '(') == (ROOT/'README.md').read_text(), 'run make readme'


def test_pins_of_nbdev_stand_in_the_dev_extra_only():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini')
    for name, value in ini['DEFAULT'].items():
        if name.endswith('requirements'):
            assert all((pin in value.split()) == (name == 'dev_requirements') for pin in ('nbdev==2.4.14', 'fastcore<2', 'execnb<0.2', 'ghapi<2')), name


def test_constraints_name_no_host():
    assert '://' not in (ROOT/'constraints.txt').read_text() and '--' not in (ROOT/'constraints.txt').read_text()
