"""Sphinx configuration of the site. Nothing is executed and nothing is fetched while it is built: notebooks are shown with the outputs they keep, and all scripts, styles and fonts lie in the site."""
import json
import os
import posixpath
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(ROOT/'settings.ini', encoding='utf-8')
project, author, copyright, release = (ini['DEFAULT'][key] for key in ('title', 'author', 'copyright', 'version'))

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode', 'sphinx-mathjax-offline']
mathjax_path = 'mathjax/tex-chtml.js'
exclude_patterns = ['_build', 'vega', 'library/index.ipynb', 'library/pipeline', '**/.ipynb_checkpoints', 'library/[!0-9e]*']
language, default_role, nitpicky = 'en', 'literal', False
# several classes have an attribute of one name, and a word in a list of types may mean any of them: no link then
suppress_warnings = ['mystnb.unknown_mime_type', 'ref.python']

nb_execution_mode = 'off'
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist', 'attrs_inline']
myst_heading_anchors = 4

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
add_module_names = False
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_custom_sections = ['Source']
napoleon_use_rtype, napoleon_use_ivar = False, True

html_theme = 'sphinx_book_theme'
html_title = project
html_static_path = ['_static']
html_css_files = ['site.css']
html_js_files = ['site.js']
html_copy_source = False
html_show_sourcelink = False
html_context = {'default_mode': 'auto'}
html_theme_options = {'use_download_button': False, 'use_fullscreen_button': False, 'home_page_in_toc': False, 'show_navbar_depth': 1, 'navigation_with_keys': False, 'navbar_persistent': [],
                      'pygments_light_style': 'a11y-high-contrast-light', 'pygments_dark_style': 'a11y-high-contrast-dark'}


def _page_link(docname, words, path):
    "A link from one notebook to another, as a link between pages: paths do not know that nbs/ is reached through the link docs/library. A stage's notebook is no page."
    target = posixpath.normpath(posixpath.join(posixpath.dirname(docname), path))
    return words if target.startswith('library/pipeline/') else f'{{doc}}`{words.strip("`")} </{target}>`'


def _for_readers(cell, docname):
    "A notebook cell as a reader wants it: None for hidden ones, else without the lines that speak to nbdev."
    lines = ''.join(cell['source']).splitlines(keepends=True)
    directives = [line for line in lines if line.startswith('#|')]
    if any(re.match(r'#\|\s*(hide|default_exp)\b', line) for line in directives):
        return None
    text = ''.join(line for line in lines if line not in directives)
    if cell['cell_type'] == 'markdown':
        text = re.sub(r'\[([^\]\[]+)\]\(([\w./]+)\.ipynb\)', lambda found: _page_link(docname, *found.groups()), text)
    return cell | {'source': text}


def read_notebook(text, docname):
    "A notebook without what is for nbdev and not for people."
    notebook = json.loads(text)
    notebook['cells'] = [kept for cell in notebook['cells'] if (kept := _for_readers(cell, docname)) is not None]
    return json.dumps(notebook)


# The rows of the table of five systems: what stands in out/compare/summary.json for each number with a deviation, in the order of README.md
FIVE_SYSTEMS = ('selfclassifier/acc', 'sela_k10/acc', 'sela_k50/acc_many_to_one', 'scan/acc', 'scan_selfclassifier/acc', 'kmeans/acc', 'kmeans_pixels/acc', 'sclre_parity/superclass_acc',
                'sclre_size/superclass_acc', 'crossentropy_parity/superclass_acc', 'crossentropy_size/superclass_acc')
_NUMBER = re.compile(r'\d\.\d{3} ± \d\.\d{3}')


def five_systems(readme=ROOT/'README.md', summary=ROOT/'out'/'compare'/'summary.json'):
    "README.md's table of all systems on the digits; its numbers are those of the last `make compare` of this copy of the project, where there was one."
    section = readme.read_text(encoding='utf-8').split('## Five systems')[1].split('\n## ')[0]
    table = re.search(r'(?m)(^\|.*\n)+', section)[0]
    runs = json.loads(summary.read_text(encoding='utf-8')) if summary.is_file() else {}
    found = [runs.get(f'digits/{name}') for name in FIVE_SYSTEMS]
    if not all(found) or len(_NUMBER.findall(table)) != len(found):
        return f'{table}\nNumbers of the project’s own run: held-out images, seeds 0 to 2, 2 cores of an AMD EPYC.\n'
    made = iter(f"{one['mean']:.3f} ± {one['sd']:.3f}" for one in found)
    return _NUMBER.sub(lambda _: next(made), table) + f"\nNumbers of the last `make compare` in this copy of the project: held-out images, mean ± standard deviation over {found[0]['n']} seeds.\n"


def published_pages():
    "Every table of the five papers, without the rows for runs of ours."
    from selfclass.published import published_tables
    from selfclass.report import compare, comparison_markdown
    made = {name: comparison_markdown(compare(None, name)) for name in published_tables()}
    return '\n'.join(f'## {name}\n\n' + re.sub(r'(?m)^\| .*not run.*\n', '', text).partition(' not run:')[0] + '\n' + text.partition('over n runs.')[2] for name, text in made.items())


def names_by_home():
    "The names that `from selfclass import …` knows, each a link to where it is described."
    import selfclass
    return '\n'.join(f'- {{py:obj}}`{name} <selfclass.{home}.{name}>`' for name, home in sorted(selfclass._HOME.items(), key=lambda one: one[0].lower()))


def module_sections(decade):
    "A section for each module whose notebook has a number of this decade: its page as a notebook, then everything public in it."
    notebooks = {found[1]: found[2] for path in sorted((ROOT/'selfclass').glob('*.py'))
                 if (found := re.search(r'File to edit: \.\./nbs/((\d)\d_\w+)\.ipynb', path.read_text(encoding='utf-8'))) and found[2] == decade}
    return '\n'.join(f'## selfclass.{name[3:]}\n\nThe notebook: {{doc}}`/library/{name}`.\n\n```{{eval-rst}}\n.. automodule:: selfclass.{name[3:]}\n   :members:\n```\n' for name in sorted(notebooks))


def read_source(app, docname, source):
    "source-read: the notebooks, and the pages of which a part is made here: `<!-- five systems -->` and the like."
    if docname.startswith('library/'):
        source[0] = read_notebook(source[0], docname)
    else:
        source[0] = re.sub(r'<!-- (five systems|published tables|names|modules (\d)) -->', lambda found: MADE[found[1].split()[0]](*filter(None, found.groups()[1:])), source[0])


MADE = {'five': five_systems, 'published': published_pages, 'names': names_by_home, 'modules': module_sections}


class Help(Directive):
    "What a command says of itself, asked while the site is built, so that it cannot grow old: the name of a module and a subcommand."
    required_arguments, final_argument_whitespace = 1, True

    def run(self):
        words = [sys.executable, '-m', *self.arguments[0].split(), '--help']
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {'PYTHONPATH': str(ROOT), 'COLUMNS': '88'})
        if said.returncode:
            raise self.error(f'{" ".join(words[1:])}: {said.stderr[-500:]}')
        return [nodes.literal_block(said.stdout, said.stdout, language='text')]


_SECTIONS = {'Parameters', 'Attributes', 'Returns', 'Yields', 'Raises', 'Examples', 'Notes', 'Source', ''}


def _sections(lines):
    "The parts of a docstring: [heading, lines] each, the summary under ''. Text after a blank line ends a list of fields: a source, an example, or a note."
    parts = [['', []]]
    for line, following in zip(lines, [*lines[1:], '']):
        listed = parts[-1][0] in ('Parameters', 'Attributes', 'Returns', 'Yields', 'Raises')
        if re.fullmatch(r'-{3,}', line.strip()) and parts[-1][1] == [] and parts[-1][0]:
            continue
        if line.strip() in _SECTIONS and re.fullmatch(r'-{3,}', following.strip()):
            parts.append([line.strip(), []])
        elif line.startswith('Source: '):
            parts.append(['Source', [line.removeprefix('Source: ')]])
        elif line.startswith('>>> ') and parts[-1][0] != 'Examples':
            parts.append(['Examples', [line]])
        elif listed and parts[-1][1][-1:] == [''] and line and not line.startswith(' ') and ' : ' not in line and '  ' not in line:
            parts.append(['Notes', [line]])
        else:
            parts[-1][1].append(line)
    return parts


def _escaped(text):
    "Signs that reStructuredText would read as markup, kept as they are; what stands in backticks is left alone."
    return ''.join(part if i % 2 else re.sub(r'([*|\\])|(?<=\w)(_)(?!\w)', r'\\\1\2', part) for i, part in enumerate(re.split(r'(`[^`]*`)', text)))


def _field(line):
    "`name : type   meaning` on one line becomes two, as numpy's form has them."
    head, _, meaning = line.partition('   ') if '   ' in line.strip() else re.split(r'(\s{2,})', line, maxsplit=1) if '  ' in line.strip() else (line, '', '')
    return [_escaped(head.rstrip()), *(['    ' + _escaped(meaning.strip())] if meaning.strip() else [])]


def read_docstring(app, what, name, obj, options, lines):
    "autodoc-process-docstring, before napoleon: the house's docstrings say shape and meaning on one line; numpy's form wants two."
    made = []
    for heading, body in _sections(lines):
        made += ['', heading, '-'*len(heading)] if heading else []
        for line in body:
            if heading in ('', 'Notes', 'Source'):
                made.append(_escaped(line) if not line.startswith('    ') else line)
            elif heading == 'Examples':
                made.append(line)
            elif line.startswith(' '):
                made.append('    ' + _escaped(line.strip()))
            else:
                made += [new for part in re.split(r';\s{2,}(?=\w[\w, ]* : )', line) for new in _field(part)]
    lines[:] = made


def one_document(app, doctree):
    "doctree-read: what `eval-rst` makes belongs to a document of its own, with which Sphinx would keep its whole environment, 25 MB for each page of the interface."
    for node in doctree.findall():
        node.document = doctree


def setup(app):
    app.add_directive('help', Help)
    app.connect('source-read', read_source)
    app.connect('doctree-read', one_document)
    app.connect('autodoc-process-docstring', read_docstring, priority=100)
