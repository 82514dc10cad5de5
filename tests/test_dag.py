"""Who may import whom (DESIGN: a module imports only from a lower decade, or a lower number in its own)."""
import ast
import re

import pytest
from conftest import ROOT, cells_of, library_notebooks, python, source_of

HEAVY = ('dvc', 'papermill', 'nbdev', 'fastcore', 'execnb', 'ipywidgets', 'pyarrow', 'ruamel', 'IPython', 'seaborn')
ALLOWED = {'torch', 'torchvision', 'numpy', 'scipy', 'sklearn', 'safetensors', 'tqdm', 'yaml', 'PIL'}


def number(module):
    found = next(nb for nb in library_notebooks() if re.match(rf'\d+_{module}$', nb.stem))
    return int(found.stem.split('_')[0])


MODULES = {re.search(r'default_exp (\w+)', source_of(cells_of(nb)[0]))[1]: nb for nb in library_notebooks()}


def package_imports(module):
    "Modules of the package that a module imports, wherever in the file."
    found = set()
    for node in ast.walk(ast.parse((ROOT/'selfclass'/f'{module}.py').read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split('.')[0]} if node.module else {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('selfclass.'):
            found.add(node.module.split('.')[1])
    return found & set(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_imports_only_from_below(module):
    for other in package_imports(module):
        below = number(other) < number(module) or (number(other) == number(module) and not package_imports(other))
        assert below, f'{module} ({number(module)}) imports {other} ({number(other)})'


@pytest.mark.parametrize('module', MODULES)
def test_decades_keep_apart(module):
    decades = {other: number(other) // 10 for other in package_imports(module)}
    if number(module) // 10 == 5:
        assert 5 not in decades.values(), f'methods do not import each other: {decades}'
    if number(module) in (60, 62, 64, 65):
        assert not {2, 3, 4, 5} & set(decades.values()), f'measures start without torch: {decades}'
    if number(module) == 61:
        assert {other for other, decade in decades.items() if decade in (2, 3, 4, 5)} <= {'embed', 'search', 'lars', 'train'}
    if number(module) == 63:
        assert not {3, 5} & set(decades.values()), f'transfer measures any network, by whatever method: {decades}'
    assert 7 not in decades.values() or number(module) // 10 == 7


def test_names_of_notebooks_and_modules():
    assert all(nb.stem.split('_', 1)[1] == module for module, nb in MODULES.items())
    numbers = [nb.stem.split('_')[0] for nb in library_notebooks() if nb.stem != '00_errors']      # shares the ground floor, imports nothing
    assert len(set(numbers)) == len(numbers)
    assert package_imports('errors') == set()


def test_training_runs_on_a_bare_machine():
    "The training modules import, and train, with the pipeline's packages out of reach."
    code = f'''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}: raise ModuleNotFoundError(name + " is not on a bare machine")
sys.meta_path.insert(0, Blocked())
import torch, numpy as np
import selfclass, selfclass.probe, selfclass.transfer, selfclass.metrics, selfclass.hub
from selfclass.data import ImageSet
from selfclass.selfclassifier import fit_selfclassifier
images = ImageSet("noise", torch.randint(0, 255, (64, 3, 8, 8), dtype=torch.uint8))
run = fit_selfclassifier(images, model=dict(backbone="convnet", width=4, hidden=8, dim=4, classes=(3,)), views=dict(preset="glyphs", n_local=0, global_size=8),
                         optimizer=dict(name="lars", lr=.1), schedule={{}}, epochs=1, batch_size=32, device="cpu")
print(len(run.record.rows))
'''
    ran = python('-W', 'error::ImportWarning', '-c', code)
    assert ran.returncode == 0 and ran.stdout.strip() == '1', ran.stderr[-2000:]


def test_training_modules_import_allowed_packages_only():
    for module in MODULES:
        if number(module) >= 62 and number(module) != 63:
            continue
        for node in ast.parse((ROOT/'selfclass'/f'{module}.py').read_text()).body:      # top level only
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.split('.')[0]
                assert top in ALLOWED | {'selfclass'} or top in __import__('sys').stdlib_module_names, f'{module} imports {name} at the top'


def test_measures_start_without_torch():
    ran = python('-c', 'import sys, selfclass, selfclass.core, selfclass.run, selfclass.metrics, selfclass.hierarchy, selfclass.published, selfclass.report, selfclass.figures; print("torch" in sys.modules)')
    assert ran.stdout.strip() == 'False', ran.stderr


def test_public_names_are_lazy_and_differ_from_modules():
    ran = python('-c', 'import sys, selfclass; assert not {"torch", "numpy"} & set(sys.modules); '
                       'assert not set(selfclass.__all__) & set(selfclass._MODULES); print(*selfclass.__all__)')
    assert ran.returncode == 0, ran.stderr
    assert not set(ran.stdout.split()) & set(MODULES)


@pytest.mark.parametrize('name', ['uniform_prior_loss', 'ClusterNet', 'MultiCrop', 'load_images', 'cluster_scores', 'fit_selfclassifier'])
def test_public_names_resolve(name):
    import selfclass
    assert name in selfclass.__all__ and name in dir(selfclass) and callable(getattr(selfclass, name))


def test_unknown_name_is_an_attribute_error():
    import selfclass
    with pytest.raises(AttributeError, match='no attribute'):
        selfclass.no_such_thing
