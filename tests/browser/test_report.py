"""The html report of a result in a browser without a network: nothing is missing, nothing fails, it can be read."""
import base64
import io
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from selfclass.explorer import contrast
from selfclass.gallery import write_report
from selfclass.result import ClusterResult

from .conftest import opened_page, snap

pytestmark = pytest.mark.browser

# every text with the background that it stands on; contrast as WCAG 2.1 computes it
CONTRAST = '''() => {
  const part = v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 };
  const light = ([r, g, b]) => .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const ground = node => { for (; node; node = node.parentElement) { const c = numbers(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0) return c } return [255, 255, 255] };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    const [a, b] = [light(numbers(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), walk.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found }'''


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "The page of 120 pictures in six named clusters, one of them empty."
    rng, room = np.random.default_rng(0), tmp_path_factory.mktemp('report')
    kind = rng.integers(0, 5, 120)
    probs = np.eye(6)[kind] * .7 + rng.dirichlet(np.ones(6), 120) * .3
    pixels = np.broadcast_to((40 * kind)[:, None, None, None], (120, 3, 24, 24)).astype(np.uint8)
    names = ['cats', 'dogs & <b>wolves</b>', '猫', 'a name that is a good deal longer than it should be', 'cluster 4', 'nothing']
    result = ClusterResult(probs, rng.normal(size=(120, 8)) + 5 * rng.normal(size=(6, 8))[kind], pixels=pixels, names=names, facts={'seed': 0})
    return write_report(replace(result, paths=[f'year/{i} <i>.png' for i in range(120)]), room/'report.html', 'Photos', skipped=[('broken.png', 'no picture')])


@pytest.fixture
def opened(browser, report):
    "A function that opens the report, as wide as it says."
    @contextmanager
    def open_it(width=1280, height=900, scheme='light'):
        with opened_page(browser, viewport={'width': width, 'height': height}, color_scheme=scheme, offline=True) as page:
            page.goto(report.as_uri())
            yield page
    return open_it


def test_nothing_is_fetched_and_nothing_fails(opened):
    with opened() as page:
        snap(page, 'report')
        assert page.complaints == [] and page.asked == []
        assert page.title() == 'Photos' and page.locator('article').count() == 5 and page.locator('h1').inner_text() == 'Photos'
        assert page.get_by_role('heading', name='dogs & <b>wolves</b>').count() == 1


def test_pictures_are_drawn_and_described(opened):
    with opened() as page:
        assert page.evaluate('[...document.images].every(i => i.alt && i.naturalWidth > 0)')
        tiles = page.locator('[role=img]')
        assert tiles.count() > 100 and all(tiles.evaluate_all('nodes => nodes.map(n => n.getAttribute("aria-label"))'))
        shot = Image.open(io.BytesIO(page.locator('article .tile').first.screenshot())).convert('L')
        source = page.locator('article .strip').first.evaluate('n => n.style.getPropertyValue("--strip")')
        strip = Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2].rstrip(')')))).convert('L')
        assert abs(np.asarray(shot)[20:40, 20:40].mean() - np.asarray(strip)[20:40, 20:40].mean()) < 4        # the first window shows the first picture


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contrast_is_enough_to_read(opened, scheme):
    with opened(scheme=scheme) as page:
        page.evaluate('document.querySelectorAll("details").forEach(d => d.open = true)')
        found = page.evaluate(CONTRAST)
        assert len(found) > 200 and min(found)[0] >= 4.5, min(found)
        bar, ground = page.locator('.bar span').first.evaluate('e => [getComputedStyle(e).backgroundColor, getComputedStyle(document.body).backgroundColor]')
        assert contrast(*([int(v) / 255 for v in re.findall(r'\d+', colour)[:3]] for colour in (bar, ground))) >= 3


def test_a_phone_needs_no_scrolling_sideways(opened):
    with opened(390, 844) as page:
        snap(page, 'report-phone')
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        assert page.locator('#clusters .scroll').evaluate('e => e.scrollWidth <= e.clientWidth'), 'a long name pushes the numbers out'
        boxes = page.locator('.tile').evaluate_all('nodes => nodes.map(n => n.getBoundingClientRect()).map(b => [b.left, b.right, b.width])')
        assert all(left >= 0 and right <= 390 and width >= 44 for left, right, width in boxes)


def test_the_keyboard_reaches_what_can_be_opened(opened):
    with opened() as page:
        seen = set()
        for _ in range(40):
            page.keyboard.press('Tab')
            seen.add(page.evaluate('document.activeElement.tagName'))
        assert {'A', 'SUMMARY'} <= seen
        page.locator('summary').first.focus()
        page.keyboard.press('Enter')
        assert page.locator('details').first.get_attribute('open') is not None
        page.locator('a[href="#cluster-0"]').click()
        assert page.url.endswith('#cluster-0')
