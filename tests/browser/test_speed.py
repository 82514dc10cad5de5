"""How long people wait: measured figures, kept in artefacts/figures.json; none is asserted.

A selection is timed with the page at rest, as people press, and once more with presses as fast as the page takes them, when each waits for the points of the one before."""
import os
import textwrap

import nbformat
import pytest

from .conftest import keep_figures, snap

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400), pytest.mark.filterwarnings('default')]

MAKE = '''
import numpy as np, time
import selfclass.explorer as explorer
from selfclass.result import ClusterResult
rng = np.random.default_rng(0)
n, k = {n}, 50
owner = rng.integers(0, k, n)
probs = rng.dirichlet(np.full(k, .2), n).astype(np.float32)
features = (rng.normal(size=(k, 64))[owner] + .5 * rng.normal(size=(n, 64))).astype(np.float32)
xy = (rng.normal(size=(k, 2))[owner] + .1 * rng.normal(size=(n, 2))).astype(np.float32)
pixels = np.broadcast_to(rng.integers(0, 255, (1, 3, 32, 32), dtype=np.uint8), (n, 3, 32, 32))
result = ClusterResult(probs, features=features, xy=xy, pixels=pixels, cluster=owner)
'''
SHOW = '''
started = time.time()
shown = explorer.explore(result, {folder!r})
print('in the kernel', round(time.time() - started, 2))
shown
'''
CLOCK = '''async (work) => {
  const turn = () => document.querySelector('.sc-tile')?.dataset.image;
  const before = turn(), start = performance.now();
  document.querySelector(work).click();
  await new Promise((done) => { const look = () => (turn() !== before && turn() !== undefined ? done() : requestAnimationFrame(look)); look(); });
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - start;
}'''
PAINTED = '''() => new Promise((done) => {
  const ready = () => document.querySelector('tr[data-cluster]') && [...document.querySelectorAll('canvas')].some((c) => c.width > 300);
  const look = () => (ready() ? requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))) : requestAnimationFrame(look));
  look();
})'''


def measure(page, lab, repository, n):
    "First paint, and from a press to thumbnails, of n images."
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(text)) for text in (MAKE.format(n=n), SHOW.format(folder=str(repository/f'curated-{n}')))])
    book.metadata['kernelspec'] = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    nbformat.write(book, repository/f'speed-{n}.ipynb')
    page.goto(f'{lab}/lab/tree/speed-{n}.ipynb?reset')
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=120_000)
    page.wait_for_timeout(1000)
    page.locator('.jp-CodeCell').first.click()
    page.keyboard.press('Shift+Enter')
    page.wait_for_function('/\\[1\\]/.test(document.querySelector(".jp-CodeCell .jp-InputArea-prompt").innerText)', timeout=120_000)
    page.wait_for_timeout(500)
    start = page.evaluate('performance.now()')
    page.keyboard.press('Shift+Enter')
    page.set_default_timeout(120_000)
    painted = page.evaluate(PAINTED)
    kernel = page.locator('.jp-OutputArea-output', has_text='in the kernel').first.inner_text()
    waits = []
    for cluster in (3, 7, 11, 15, 19):
        page.wait_for_timeout(1500)
        waits.append(page.evaluate(CLOCK, f'[data-key="show{cluster}"]'))
    page.wait_for_timeout(1500)
    hurried = [page.evaluate(CLOCK, f'[data-key="show{cluster}"]') for cluster in (4, 8, 12, 16, 20)]
    page.wait_for_timeout(1500)
    snap(page, f'speed-{n}')
    keep_figures(f'{n} images', first_paint_s=round((painted - start) / 1000, 2), of_which_kernel_s=float(kernel.split()[-1]), selection_to_thumbnails_ms=[round(w) for w in waits], presses_without_a_pause_ms=[round(w) for w in hurried],
                 goal_first_paint_s=3 if n <= 10_000 else 10, goal_selection_ms=300, drawn_by='SwiftShader, on the processor', load=round(os.getloadavg()[0], 1))
    assert page.asked == [] and page.complaints == []
    assert page.locator('.sc-tile').count() == 60


def test_ten_thousand_images(page, lab, repository):
    measure(page, lab, repository, 10_000)


@pytest.mark.long
def test_a_hundred_thousand_images(page, lab, repository):
    measure(page, lab, repository, 100_000)
