"""The theory notebook: every statement in it holds, and what a reader sees is what it computes."""
import ast

import nbformat
import pytest
from conftest import ROOT, cells_of, source_of
from nbclient import NotebookClient

THEORY = ROOT/'nbs'/'explore'/'theory.ipynb'
CODE = [source_of(cell) for cell in cells_of(THEORY) if cell['cell_type'] == 'code']


def test_statements_hold(monkeypatch):
    "Executed as a reader would; each assertion of the notebook is one of its statements."
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    nb = nbformat.read(THEORY, as_version=4)
    NotebookClient(nb, timeout=240, kernel_name='python3', resources={'metadata': {'path': str(THEORY.parent)}}).execute()
    # joined: a busy machine hands one print over in two pieces
    printed = lambda book: [''.join(o['text'] for o in cell.outputs if o.get('name') == 'stdout') for cell in book.cells if cell.cell_type == 'code']
    assert printed(nb) == printed(nbformat.read(THEORY, as_version=4)), 'the numbers a reader sees are not those of the code; execute it again'


def test_every_section_asserts_something():
    sections, counts = 0, []
    for cell in cells_of(THEORY):
        if cell['cell_type'] == 'markdown' and source_of(cell).startswith('## '):
            sections += 1
            counts.append(0)
        elif cell['cell_type'] == 'code' and counts:
            counts[-1] += sum(isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'close')
                              for node in ast.walk(ast.parse(source_of(cell))))
    assert sections == 9 and all(n >= 2 for n in counts[:8]), counts


def test_it_looks_at_the_library_and_exports_nothing():
    assert not any(line.startswith('#|') for source in CODE for line in source.splitlines())
    assert any('from selfclass.loss import' in source for source in CODE)
    cells = [cell for cell in cells_of(THEORY) if cell['cell_type'] == 'code']
    assert sum(any('image/png' in o.get('data', {}) for o in cell['outputs']) for cell in cells) == 10
    assert not any(o['output_type'] == 'error' or o.get('name') == 'stderr' for cell in cells for o in cell['outputs'])
    assert THEORY.stat().st_size < 400_000


@pytest.mark.parametrize('fact', ['Proposition 1', 'Proposition 2', r'\log C', r'\mathrm{KL}(f', r'\log (C/N)', 'saddle', 'prior'])
def test_statements_are_named(fact):
    assert any(fact in source_of(cell) for cell in cells_of(THEORY) if cell['cell_type'] == 'markdown')
