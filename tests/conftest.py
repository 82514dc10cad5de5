"""Shared by all tests: where the repository is, and a way to look at its notebooks."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault('SELFCLASS_PROGRESS', 'off')
signal.signal(signal.SIGINT, signal.default_int_handler)          # a shell's background job ignores it, and so would every process that a test interrupts


def library_notebooks():
    "Notebooks that export a module, in order."
    return sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))


def stage_notebooks():
    return sorted((ROOT/'nbs'/'pipeline').glob('*.ipynb'))


def cells_of(notebook):
    return json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']


def source_of(cell):
    return ''.join(cell['source'])


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    "An empty repository of this project: settings.ini, the stage notebooks and the digits, with the working folder in it."
    for name in ('settings.ini', 'params.yaml', 'nbs/pipeline', 'conf', 'data/digits'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).symlink_to(ROOT/name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(*arguments, cwd=ROOT, **environment):
    "Run Python in a process of its own."
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600,
                          env=os.environ | {'PYTHONPATH': str(ROOT)} | environment)
