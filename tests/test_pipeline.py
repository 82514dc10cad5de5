"""Stages, params.yaml, notebooks and dvc.yaml say the same."""
import ast
import re

import pytest
import yaml
from conftest import ROOT, cells_of, source_of, stage_notebooks
from selfclass.core import read_yaml
from selfclass.run import parameter_names, read_params

DVC = {stage: entry.get('do', entry) for stage, entry in yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages'].items()}
PARAMS = read_yaml(ROOT/'params.yaml')
METHODS = {section: {entry.get('module', name) for name, entry in PARAMS[section].items()} for section in ('methods', 'derive')}
STAGES = {nb.stem: nb for nb in stage_notebooks()}
KEYS = {'dataset', 'method', 'seed'}


def imported(tree):
    "Modules of selfclass that a syntax tree imports, through the package's relative or absolute names."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('selfclass.'):
            found.add(node.module.split('.')[1])
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {name.name for name in node.names}
    return {module for module in found if (ROOT/'selfclass'/f'{module}.py').exists()}


def reached(modules):
    "The modules and all that they import."
    todo, done = set(modules), set()
    while todo:
        module = todo.pop()
        done.add(module)
        todo |= imported(ast.parse((ROOT/'selfclass'/f'{module}.py').read_text())) - done
    return done


def test_stage_is_notebook_is_section():
    assert set(DVC) == set(STAGES)
    for stage, entry in DVC.items():
        assert entry['cmd'].startswith(f'python -m selfclass.run {stage}') and 'papermill' not in entry['cmd']
        outs = [out for kind in ('outs', 'metrics') for out in entry.get(kind, [])]
        assert all(f'{out}/'.startswith((f'out/{stage}/', f'out/notebooks/{stage}/')) for out in outs), outs
        assert any(str(out).startswith(f'out/notebooks/{stage}/') for out in outs), 'the executed notebook is an output'
        assert f'nbs/pipeline/{stage}.ipynb' in entry['deps']


@pytest.mark.parametrize('stage', DVC)
def test_deps_name_every_module_the_stage_reaches(stage):
    trees = [ast.parse(source_of(c)) for c in cells_of(STAGES[stage]) if c['cell_type'] == 'code']
    modules = set().union(*map(imported, trees))
    named = METHODS.get({'pretrain': 'methods'}.get(stage, stage), set())              # modules that are imported by name
    copied = set().union(*METHODS.values()) if stage == 'modules' else set()           # and those that are read as files
    needed = (reached(modules | named) - named) | copied
    listed = {re.fullmatch(r'selfclass/(\w+)\.py', dep)[1] for dep in DVC[stage]['deps'] if re.match(r'selfclass/.*\.py$', dep)}
    assert listed == needed, f'missing {needed - listed}, too many {listed - needed}'
    loads = stage in ('embed', 'probe')                                                # networks, whose class may be a method's own
    assert (bool(named) or loads) == any(re.fullmatch(r'out/modules/\$\{(item\.method|key)\}\.py', dep) for dep in DVC[stage]['deps'])


@pytest.mark.parametrize('stage', DVC)
def test_params_name_every_section_the_stage_reads(stage):
    sections = set(parameter_names(STAGES[stage])) - KEYS
    listed = {param.split('.')[0] for param in DVC[stage]['params']}
    assert listed == sections
    keys = set(parameter_names(STAGES[stage])) & KEYS
    given = re.findall(r'--(\w+) \$\{(?:item\.)?(\w+)\}', DVC[stage]['cmd'])
    assert keys == {option for option, _ in given} and all(name in (option, 'key') for option, name in given)


@pytest.mark.parametrize('notebook', stage_notebooks(), ids=lambda nb: nb.stem)
def test_stage_notebooks_are_recipes(notebook):
    cells = cells_of(notebook)
    tagged = [c for c in cells if c['metadata'].get('tags')]
    assert [c['metadata']['tags'] for c in tagged] == [['parameters']]
    code = [c for c in cells if c['cell_type'] == 'code']
    assert not any(c['outputs'] for c in code), 'a stage notebook carries no outputs; run make prep'
    for cell in code:
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) for node in ast.walk(ast.parse(source_of(cell)))), 'a def belongs in the library'
    assert cells[0]['cell_type'] == 'markdown' and re.search(r'reads .*writes', ''.join(map(str, cells[0]['source'])), re.S)
    tree = ast.parse(source_of(tagged[0]))
    assert all(isinstance(node, ast.Assign) and len(node.targets) == 1 for node in tree.body)
    assert all(a.end_lineno < b.lineno for a, b in zip(tree.body, tree.body[1:])), 'one assignment per line'


PARAM_FILES = [ROOT/'params.yaml', *sorted((ROOT/'conf').glob('*.yaml'))]


@pytest.mark.parametrize('file', PARAM_FILES, ids=lambda f: f.stem)
def test_params_files_are_complete(file):
    params = read_params(file)
    needed = {name for nb in stage_notebooks() for name in parameter_names(nb)} - KEYS
    assert set(params) == needed
    assert params['report']['method'] in params['methods']


def test_the_default_is_the_digits_recipe():
    assert (ROOT/'params.yaml').read_bytes() == (ROOT/'conf'/'digits.yaml').read_bytes()


def test_params_mean_the_same_to_dvc():
    "Our loader and DVC's read the same values of the same types."
    from dvc.utils.serialize import load_yaml
    def typed(value):
        if isinstance(value, dict):
            return {key: typed(v) for key, v in value.items()}
        return [typed(v) for v in value] if isinstance(value, list) else (type(value).__name__, value)
    for file in PARAM_FILES:
        assert typed(read_yaml(file)) == typed(load_yaml(str(file)))
