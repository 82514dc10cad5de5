"""The site: it builds without a warning, its links hold, nothing comes from elsewhere, and what it tells people to type works."""
import ast
import importlib
import inspect
import json
import re
import shlex
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, library_notebooks, python
from docs_site import PAGES, blocks, built_site

import selfclass


@pytest.fixture(scope='session')
def site():
    made = built_site()
    assert made.status == 0, made.said
    return made.folder


class Reader(HTMLParser):
    "Ids of a page, its links, and what it loads."
    ASSETS = {'script': 'src', 'img': 'src', 'iframe': 'src', 'source': 'src', 'video': 'src', 'audio': 'src', 'embed': 'src', 'object': 'data'}

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.assets = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ('id', 'name') if found.get(key)}
        if tag == 'a' and found.get('href'):
            self.links.append(found['href'])
        if found.get(self.ASSETS.get(tag)):
            self.assets.append(found[self.ASSETS[tag]])
        if tag == 'link' and found.get('rel') not in ('canonical', 'next', 'prev', 'index', 'search', 'author'):
            self.assets.append(found.get('href', ''))


@pytest.fixture(scope='session')
def read(site):
    return {page: Reader(page.read_text(encoding='utf-8')) for page in site.rglob('*.html') if '_static' not in page.relative_to(site).parts}


def test_the_site_has_a_page_for_every_page_and_every_library_notebook(site):
    wanted = [page.relative_to(ROOT/'docs').with_suffix('.html') for page in PAGES] + [Path('library', f'{book.stem}.html') for book in library_notebooks()]
    assert not [page for page in wanted if not (site/page).is_file()]
    assert not list((site/'library').glob('pipeline/*')) and not (site/'library'/'index.html').exists()


def test_every_internal_link_resolves(read):
    broken = []
    for page, found in read.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent/unquote(parts.path)).resolve() if parts.path else page.resolve()
            there = read.get(target) or next((other for path, other in read.items() if path.resolve() == target), None) if target.suffix == '.html' else None
            if not target.is_file() or there and parts.fragment and unquote(parts.fragment) not in there.ids:
                broken.append(f'{page.name}: {link}')
    assert len(read) > 60 and not broken, broken[:20]


def test_nothing_is_loaded_from_elsewhere(site, read):
    outside = [f'{page.name}: {asset}' for page, found in read.items() for asset in found.assets if re.match(r'(https?:)?//', asset)]
    missing = [f'{page.name}: {asset}' for page, found in read.items() for asset in found.assets
               if not re.match(r'(https?:)?//|data:', asset) and not (page.parent/unquote(urlsplit(asset).path)).is_file()]
    styles = [f'{sheet.name}: {url}' for sheet in site.rglob('*.css') for url in re.findall(r'''(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]+)''', sheet.read_text(encoding='utf-8'))]
    assert not outside + missing + styles, (outside + missing + styles)[:20]


def test_notebooks_are_shown_without_words_for_nbdev(site):
    for page in (site/'library').glob('*.html'):
        text = re.sub(r'<[^>]+>', '', page.read_text(encoding='utf-8'))
        assert not re.search(r'(?m)^\s*#\|\s*(export|hide|default_exp|slow|cuda)\b', text), page.name
        assert 'nbdev_export' not in text, page.name


def test_kept_outputs_are_shown(site):
    assert len(list((site/'_images').glob('*.png'))) > 50
    assert 'output text_plain' in (site/'library'/'30_loss.html').read_text(encoding='utf-8')


def test_every_module_and_every_public_name_is_described(read):
    described = set().union(*(found.ids for page, found in read.items() if page.parent.name == 'reference'))
    modules = [f'module-selfclass.{name}' for name in selfclass._MODULES]
    names = [f'selfclass.{home}.{name}' for name, home in selfclass._HOME.items()]
    assert not set(modules + names) - described


def test_a_docstring_becomes_fields_with_shape_error_and_source(site):
    text = (site/'reference'/'loss.html').read_text(encoding='utf-8')
    told = re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', '', text[text.index('id="selfclass.loss.log_targets"'):text.index('id="selfclass.loss.log_predictions"')]))
    for words in ('logits (Tensor (..., B, C)) – of one view', 'Returns:', 'Raises:', 'ParamsError', 'Source', 'Amrani et al. (2022), eq. 2.'):
        assert words in told, words


def configuration():
    "docs/conf.py as a dict of its names."
    import runpy
    return runpy.run_path(str(ROOT/'docs'/'conf.py'))


def test_the_table_of_five_systems_is_that_of_the_readme_until_there_are_runs(tmp_path):
    conf = configuration()
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    table = conf['five_systems'](summary=tmp_path/'none')
    assert len(table.splitlines()) > 10 and all(line in readme for line in table.splitlines()[:11])
    numbers = {f'digits/{name}': {'mean': i/100, 'sd': i/1000, 'n': 5} for i, name in enumerate(conf['FIVE_SYSTEMS'])}
    (tmp_path/'summary.json').write_text(json.dumps(numbers))
    made = conf['five_systems'](summary=tmp_path/'summary.json')
    assert 'SeLa, four heads of 50 labels | random weights | none | many to one 0.020 ± 0.002 |' in made and '5 seeds' in made
    (tmp_path/'summary.json').write_text(json.dumps({'other/selfclassifier/acc': {'mean': .5, 'sd': .1, 'n': 1}}))
    assert conf['five_systems'](summary=tmp_path/'summary.json') == table


def test_numbers_with_a_deviation_are_those_of_the_readme():
    known = (ROOT/'README.md').read_text(encoding='utf-8')
    for page in PAGES:
        told = re.findall(r'\d\.\d{3} ± \d\.\d{3}', page.read_text(encoding='utf-8'))
        assert not [number for number in told if number not in known], page.name


# What people are told to type


@pytest.fixture
def folder_of_pictures(scratch):
    "A place to run a page's code in: a repository with digits, a folder of pictures of which one is broken in a copy, a backbone's file."
    from PIL import Image
    images = selfclass.load_images('digits', size=32)
    for i in range(48):
        file = scratch/'my_folder'/str(images.labels[i])/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(file)
    return scratch


def marked(block, word):
    return [remark.removeprefix(f'% {word}:').strip() for remark in block.remarks if remark.startswith(f'% {word}:')]


def as_tested(block):
    "The code of a block with the small numbers of its remarks: `% replace: epochs=160 => epochs=1`."
    code = block.code
    for remark in marked(block, 'replace'):
        before, after = remark.split(' => ')
        assert before in code, f'{before!r} does not stand in the block below it'
        code = code.replace(before, after)
    return code


def imported(tree):
    "Name -> object for everything of this library that a block imports; a name that is not there is an error."
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'selfclass':
            module = importlib.import_module(node.module)
            found |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    return found


def check_calls(code, known):
    "Every keyword that a block gives to a function of this library is one that it takes."
    tree = ast.parse(code)
    known = known | imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            takes = inspect.signature(known[node.func.id]).parameters
            free = any(one.kind is one.VAR_KEYWORD for one in takes.values())
            assert free or all(word.arg is None or word.arg in takes for word in node.keywords), ast.unparse(node)
    return known


WITH_PYTHON = [page for page in PAGES if blocks(page, 'python')]


@pytest.mark.parametrize('page', WITH_PYTHON, ids=lambda page: page.relative_to(ROOT/'docs').as_posix())
def test_python_of_a_page_runs(page, folder_of_pictures, capsys):
    if any("'resnet18.pth'" in as_tested(block) for block in blocks(page, 'python')):
        import torch
        import torchvision
        torch.save(torchvision.models.resnet18().state_dict(), 'resnet18.pth')
    names, known = {'__name__': 'page'}, {}
    for block in blocks(page, 'python'):
        known = check_calls(block.code, known)
        if not marked(block, 'compile only'):
            exec(compile(as_tested(block), str(page), 'exec'), names)


@lru_cache
def help_of(module, command):
    said = python('-m', f'selfclass.{module}', *([command] if command else []), '--help')
    assert said.returncode == 0, f'selfclass.{module} {command}: {said.stderr[-300:]}'
    return said.stdout


def shell_lines():
    for page in PAGES:
        for block in blocks(page, 'sh'):
            for line in block.code.splitlines():
                if words := shlex.split(line, comments=True):
                    yield page.relative_to(ROOT/'docs').as_posix(), words


@pytest.mark.parametrize('page, words', [pytest.param(page, words, id=f'{page}: {" ".join(words)[:60]}') for page, words in shell_lines()])
def test_shell_line_names_what_there_is(page, words):
    if words[0] == 'make':
        assert re.search(rf'(?m)^{words[1]}:', (ROOT/'Makefile').read_text()), words
    elif words[0] == 'selfclass':
        told = help_of('cli', words[1])
        assert not [word for word in words[2:] if word.startswith('--') and not re.search(rf'{word}\b', told)], told
    elif '-m' in words and words[words.index('-m') + 1].startswith('selfclass.'):
        at = words.index('-m') + 1
        command = next(iter(words[at + 1:]), '')
        told = help_of(words[at].removeprefix('selfclass.'), command if command.isalpha() and words[at] != 'selfclass.run' else '')
        assert not [word for word in words[at + 1:] if word.startswith('--') and not re.search(rf'{word}\b', told)], told
    elif words[0] == 'dvc':
        assert words[1] in ('repro', 'exp', 'metrics', 'plots')
        stages = [word.split('@')[0] for word in words[2:] if words[1] == 'repro' and not word.startswith('-')]
        assert all(re.search(rf'(?m)^  {stage}:', (ROOT/'dvc.yaml').read_text()) for stage in stages), words
    else:
        assert words in (['.', '.venv/bin/activate'],), f'a command that nothing checks: {words}'
    for word in words:
        assert not word.startswith('conf/') or (ROOT/word).is_file(), word
        assert not word.startswith('NAME=') or (ROOT/'conf'/f'{word[5:]}.yaml').is_file(), word


def test_yaml_of_the_pages_can_be_read(tmp_path):
    from selfclass.core import read_yaml
    found = [(page, block.code) for page in PAGES for block in blocks(page, 'yaml')]
    assert len(found) > 4
    for page, code in found:
        (tmp_path/'some.yaml').write_text(code)
        assert isinstance(read_yaml(tmp_path/'some.yaml'), dict), page.name


def test_a_link_between_notebooks_leads_to_the_page_and_one_to_a_stage_is_words():
    read = configuration()['read_notebook']
    cells = [{'cell_type': 'markdown', 'source': ['See [`loss`](../30_loss.ipynb), [theory](theory.ipynb) and [the stage](../pipeline/compare.ipynb); x = [1](2).']},
             {'cell_type': 'code', 'source': ['#| export\n', 'def f():\n', '    return "[a](b.ipynb)"']}, {'cell_type': 'code', 'source': '#| hide\nimport nbdev; nbdev.nbdev_export()'}]
    made = json.loads(read(json.dumps({'cells': cells}), 'library/explore/some'))['cells']
    assert [cell['source'] for cell in made] == ['See {doc}`loss </library/30_loss>`, {doc}`theory </library/explore/theory>` and the stage; x = [1](2).', 'def f():\n    return "[a](b.ipynb)"']
