"""The documentation site, built once for all tests of it."""
import atexit
import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT, python

# Pages of prose: what is in docs/ itself, not in the link to the notebooks
PAGES = sorted(page for page in (ROOT/'docs').rglob('*.md') if 'library' not in page.relative_to(ROOT/'docs').parts[:1])


class Site(NamedTuple):
    folder: Path
    said: str                # warnings and errors
    status: int


@lru_cache
def built_site():
    "The site as `make docs` makes it, in a temporary folder."
    folder = Path(tempfile.mkdtemp(prefix='selfclass-site-'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = python('-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html', '-d', folder/'doctrees', ROOT/'docs', folder/'site')
    return Site(folder/'site', made.stderr[-4000:], made.returncode)


class Block(NamedTuple):
    remarks: tuple           # the comments above it: how the tests treat it
    language: str
    code: str


def blocks(page, language):
    "Fenced blocks of one language, with the MyST comments (`% …`, not shown) right above each."
    found = re.findall(r'(?ms)^((?:% [^\n]*\n)*)```(\w+)\n(.*?)^```$', page.read_text(encoding='utf-8'))
    return [Block(tuple(remarks.splitlines()), word, code) for remarks, word, code in found if word == language]
