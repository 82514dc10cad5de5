"""The documentation site as a person meets it: opened as files, with the network cut off, on a desk and on a phone."""
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from docs_site import built_site

from .conftest import snap

pytestmark = pytest.mark.browser

READ = ('index', 'tutorial/digits', 'tutorial/folder', 'tutorial/imagenet', 'howto/method', 'howto/dataset', 'explanation/theory', 'explanation/protocols', 'reference/api', 'reference/loss',
        'reference/measures', 'reference/images', 'reference/commands', 'reference/params', 'reference/published', 'reference/library', 'benchmarks', 'faq', 'changelog', 'library/30_loss',
        'library/11_augment', 'library/64_report', 'library/explore/theory')
PHONE, DESK = {'width': 390, 'height': 844}, {'width': 1280, 'height': 900}


@pytest.fixture(scope='module')
def site():
    made = built_site()
    assert made.status == 0, made.said
    return made.folder


@pytest.fixture
def opened(browser):
    "A page whose requests outside of its own place end nowhere, and what went wrong in it."
    contexts = []

    def open_page(viewport=DESK, home='file:', **more):
        context = browser.new_context(viewport=viewport, **more)
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.route(lambda url: not url.startswith((home, 'data:', 'blob:')), lambda route: (wrong.append(f'asked for {route.request.url}'), route.abort()))
        page.on('console', lambda message: wrong.append(message.text) if message.type in ('error', 'warning') else None)
        page.on('pageerror', lambda error: wrong.append(str(error)))
        page.on('requestfailed', lambda request: wrong.append(f'failed: {request.url}'))
        return page, wrong
    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope='module')
def served(site):
    "The site from a server of this machine."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()
    thread.join()


def test_pages_open_without_a_network_and_without_an_error(site, opened):
    page, wrong = opened()
    for name in READ:
        page.goto((site/f'{name}.html').as_uri(), wait_until='load')
        assert page.locator('article h1').count() == 1, name
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert not wrong and not broken, (name, wrong, broken)


def test_formulas_are_set_with_fonts_of_the_site(site, opened):
    page, wrong = opened()
    page.goto((site/'explanation'/'theory.html').as_uri())
    page.wait_for_selector('mjx-container mjx-math')
    assert page.locator('mjx-container').count() > 20 and not page.locator('mjx-merror').count()
    page.evaluate('document.fonts.ready')
    assert page.evaluate("[...document.fonts].some(f => f.family.includes('MJX') && f.status === 'loaded')") and not wrong, wrong


@pytest.mark.parametrize('word, page_found', [('imbalance', 'faq.html'), ('log_targets', 'reference/loss.html'), ('sinkhorn', 'library/51_sela.html')])
def test_search_finds_the_page_in_a_folder(site, opened, word, page_found):
    page, wrong = opened()
    page.goto((site/'search.html').as_uri() + f'?q={word}')
    page.wait_for_selector('#search-results li a')
    page.wait_for_function("!document.querySelector('#search-results .search-summary')?.textContent.includes('Searching')")
    assert any(link.split('#')[0].split('?')[0].endswith(page_found) for link in page.locator('#search-results li a').evaluate_all('found => found.map(a => a.href)'))
    assert not wrong, wrong


def test_search_from_the_field_shows_lines_when_served(opened, served):
    page, wrong = opened(home=served)
    page.goto(f'{served}/index.html')
    page.keyboard.press('Control+k')
    page.keyboard.type('Slurm')
    page.keyboard.press('Enter')
    page.wait_for_selector('#search-results li p.context')
    assert page.locator('#search-results li a[href*="howto/slurm"]').count() and not wrong, wrong


def test_a_phone_scrolls_down_only(site, opened):
    page, wrong = opened(PHONE, device_scale_factor=2, is_mobile=True, has_touch=True)
    for name in READ:
        page.goto((site/f'{name}.html').as_uri(), wait_until='load')
        wide = page.evaluate("""() => document.documentElement.scrollWidth <= document.documentElement.clientWidth ? [] : [document.documentElement.scrollWidth, ...[...document.querySelectorAll('article *')]
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('pre, .output, .pst-scrollable-table-container, .math')).slice(0, 5).map(e => `${e.tagName} ${e.textContent.slice(0, 60)}`)]""")
        assert not wide, (name, wide)
        if name == 'index':
            snap(page, 'site-phone')
    assert not wrong, wrong


def test_a_phone_reaches_every_page_by_the_menu(site, opened):
    page, wrong = opened(PHONE, is_mobile=True, has_touch=True)
    page.goto((site/'index.html').as_uri())
    page.locator('button.primary-toggle:visible, label.primary-toggle:visible').first.tap()
    link = page.locator('a:visible', has_text='Run under Slurm').first
    link.wait_for()
    link.tap()
    page.wait_for_url('**/howto/slurm.html')
    assert page.locator('article h1').inner_text().startswith('Run under Slurm') and not wrong, wrong


# Contrast of every visible piece of text with what is behind it (WCAG 2.2, 1.4.3): 4.5, or 3 for large text
_CONTRAST = """() => {
  const numbers = c => { const m = c.match(/[\\d.]+/g).map(Number); return c.startsWith('color(srgb') ? [...m.slice(0, 3).map(x => x * 255), m[3] ?? 1] : [m[0], m[1], m[2], m[3] ?? 1]; };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const behind = e => { const found = []; for (; e; e = e.parentElement) found.push(numbers(getComputedStyle(e).backgroundColor)); return found.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]); };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('mjx-container, script, style, .output_area, img, svg') || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (!box.width || !box.height || style.visibility === 'hidden' || style.opacity === '0' || e.matches(':disabled') || e.closest('.visually-hidden')) continue;
    const back = behind(e), fore = over(numbers(style.color), back), size = parseFloat(style.fontSize), bold = parseInt(style.fontWeight) >= 700;
    const needed = size >= 24 || (size >= 18.66 && bold) ? 3 : 4.5;
    if (ratio(fore, back) < needed - .005) poor.push(`${e.tagName}.${e.className} "${e.textContent.trim().slice(0, 30)}" ${ratio(fore, back).toFixed(2)} ${style.color} on ${back}`);
  }
  return [...new Set(poor)].slice(0, 20);
}"""


@pytest.mark.parametrize('look', ['light', 'dark'])
def test_text_has_contrast(site, opened, look):
    page, wrong = opened(color_scheme=look)
    for name in ('index', 'tutorial/digits', 'reference/loss', 'reference/commands', 'reference/params', 'benchmarks', 'library/30_loss', 'faq', 'search'):
        page.goto((site/f'{name}.html').as_uri(), wait_until='load')
        page.wait_for_timeout(300)                          # colours of links fade in
        assert page.evaluate("document.documentElement.dataset.theme") == look
        assert not (poor := page.evaluate(_CONTRAST)), (name, poor)
        if name == 'tutorial/digits':
            snap(page, f'site-{look}')


def test_the_keyboard_reaches_text_and_search(site, opened):
    page, wrong = opened()
    page.goto((site/'index.html').as_uri())
    page.keyboard.press('Tab')
    assert re.search('skip', page.evaluate('document.activeElement.textContent'), re.I)
    reached = set()
    for _ in range(60):
        page.keyboard.press('Tab')
        reached.add(page.evaluate('document.activeElement.textContent.trim()'))
    assert 'Digits in five minutes' in reached and not wrong, wrong
