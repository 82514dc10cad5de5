"""A browser for tests: Debian's Chromium without a network, JupyterLab and Voila on free ports, and a small repository with a run in it."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
ARTEFACTS = Path(__file__).parent/'artefacts'
CHROMIUM = os.environ.get('SELFCLASS_CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = ['--no-sandbox', '--disable-background-networking', '--no-first-run', '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage',
         '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader']
LOCAL = ('http://127.0.0.1', 'ws://127.0.0.1', 'file:', 'blob:', 'data:', 'about:')


@pytest.fixture(scope='session')
def browser():
    "Chromium; WebGL is drawn by the processor."
    if CHROMIUM is None:
        pytest.fail('no Chromium found: `apt-get install chromium` (or name it in SELFCLASS_CHROMIUM); `pytest -m "not browser"` leaves these tests out')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@contextmanager
def opened_page(browser, **options):
    "A page that reaches this machine only. `page.asked`: addresses elsewhere that it wanted; `page.complaints`: errors on the console."
    context = browser.new_context(**{'viewport': {'width': 1440, 'height': 1400}} | options)
    asked, complaints = [], []

    def gate(route):
        local = route.request.url.startswith(LOCAL)
        asked.extend([] if local else [route.request.url])
        route.continue_() if local else route.abort()
    context.route('**/*', gate)
    page = context.new_page()
    page.asked, page.complaints = asked, complaints
    page.on('console', lambda message: complaints.append(f'{message.text} ({message.location.get("url", "")})') if message.type == 'error' else None)
    page.on('pageerror', lambda error: complaints.append(str(error)))
    yield page
    context.close()


@pytest.fixture
def page(browser):
    with opened_page(browser) as page:
        yield page


def snap(page, name):
    "Keep a picture of the page for people to look at."
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS/f'{name}.png')


def keep_figures(name, **figures):
    "Keep measured numbers as JSON; they are no test."
    ARTEFACTS.mkdir(exist_ok=True)
    file = ARTEFACTS/'figures.json'
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {name: figures}, indent=1) + '\n')
    print(name, figures)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def served(arguments, folder, address, home, seconds=120, **more):
    "A server as a process of its own; `home` takes all that Jupyter writes, `more` are variables of its environment."
    settings = home/'settings'/'@jupyterlab'/'apputils-extension'
    settings.mkdir(parents=True, exist_ok=True)
    (settings/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {f'JUPYTER_{kind}_DIR': str(home/kind) for kind in ('CONFIG', 'DATA', 'RUNTIME')} | {f'JUPYTERLAB_{kind.upper()}_DIR': str(home/kind) for kind in ('settings', 'workspaces')}
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONWARNINGS'} | places | {
        'IPYTHONDIR': str(home/'ipython'), 'MPLCONFIGDIR': str(home/'mpl'), 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'} | more
    with (home/'log').open('w') as log:
        server = subprocess.Popen([sys.executable, '-m', *arguments], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            ready(server, address, home/'log', seconds)
            yield address
        finally:
            server.terminate()
            server.wait(30)


def ready(server, address, log, seconds):
    "Wait until something answers."
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(address, timeout=seconds).read()
        except urllib.error.HTTPError:
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(.2)


def write_run(out, n=360, seed=0):
    "out/embed of a method on the digits: k-means on pixels, two of the ten digits in one cluster each."
    from selfclass.core import save_arrays, save_json
    from sklearn.datasets import load_digits
    digits = load_digits()
    features, labels = digits.data[-n:].astype(np.float32), digits.target[-n:]
    means = np.stack([digits.data[digits.target == c].mean(0) for c in range(10)])
    logits = -np.linalg.norm(features[:, None] - means, axis=2) / 3
    probs = np.exp(logits - logits.max(1, keepdims=True))
    arrays = dict(test_probs_0=probs / probs.sum(1, keepdims=True), test_embeddings=features / 16, test_labels=labels, classes=np.array([10]), head_loss=np.array([.1]), class_names=np.array(list('0123456789')))
    save_arrays(out/'embed'/'selfclassifier'/'digits'/f'{seed}.npz', **arrays)
    pixels = np.repeat(np.repeat((digits.images[-n:] * 15.9).astype(np.uint8), 4, 1), 4, 2)
    save_arrays(out/'embed'/'selfclassifier'/'digits'/'thumbnails.npz', pixels=np.repeat(pixels[:, None], 3, 1), index=np.arange(n))
    for method in ('selfclassifier', 'scan'):
        scores = {str(s): {'acc': .9 + .01 * s + .03 * (method == 'scan'), 'nmi': .85 + .01 * s, 'best_head': 0} for s in range(3)}
        save_json(scores, out/'cluster'/method/'digits.json')


@pytest.fixture(scope='session')
def repository(tmp_path_factory):
    "A repository of this project with the notebooks for people and one small run in out/."
    folder = tmp_path_factory.mktemp('repository')
    for name in ('settings.ini', 'params.yaml', 'data', 'nbs/explore'):
        target = folder/name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(ROOT/name, target) if (ROOT/name).is_dir() else shutil.copy(ROOT/name, target)
    write_run(folder/'out')
    (folder/'dvc.yaml').write_text('metrics: [out/cluster/selfclassifier/digits.json, out/cluster/scan/digits.json]\n')
    subprocess.run([sys.executable, '-m', 'dvc', 'init', '-q', '--no-scm'], cwd=folder, check=True, env=os.environ | {'PYTHONWARNINGS': 'ignore'})
    return folder


@pytest.fixture(scope='session')
def lab(repository, tmp_path_factory):
    "JupyterLab on the repository; the address."
    port, home = free_port(), tmp_path_factory.mktemp('lab')
    options = [f'--ServerApp.port={port}', '--ServerApp.ip=127.0.0.1', '--IdentityProvider.token=', '--ServerApp.password=', '--ServerApp.disable_check_xsrf=True', f'--ServerApp.root_dir={repository}',
               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--ServerApp.allow_remote_access=False', '--no-browser', '--allow-root']
    with served(['jupyter', 'lab', *options], repository, f'http://127.0.0.1:{port}', home) as address:
        yield address


def run_notebook(page, lab, path, wait_for='.jp-Notebook', seconds=150):
    "Open a notebook in JupyterLab and run all its cells, until something is there and no cell waits."
    page.set_default_timeout(seconds * 1000)
    page.goto(f'{lab}/lab/tree/{path}?reset')
    page.wait_for_selector('.jp-Notebook .jp-Cell')
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    page.wait_for_function(CONNECTED)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    try:
        page.wait_for_function(DONE)
        page.wait_for_selector(wait_for)
    except Exception:
        snap(page, f'failed-{Path(path).stem}')
        raise
    finally:
        page.set_default_timeout(30_000)


CONNECTED = "document.querySelector('.jp-Toolbar-kernelName')?.innerText.includes('Python') && !/Connecting|Initializing|Starting/.test(document.querySelector('#jp-bottom-panel, .jp-StatusBar-Widget')?.innerText ?? '')"
DONE = """(() => { const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputArea-prompt')].map((p) => p.innerText.trim());
  return prompts.length > 0 && prompts.every((p) => /\\[\\d+\\]/.test(p)); })()"""


def failures(page):
    "Tracebacks in the outputs."
    return [text for text in page.locator('.jp-OutputArea-output').all_inner_texts() if re.search(r'Traceback|Error:', text)]
