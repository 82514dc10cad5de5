"""The explorer and the notebooks for people, in a real browser without a network."""
import csv
import json
import re

import pytest
from selfclass.explorer import contrast
from selfclass.result import read_names

from .conftest import failures, free_port, opened_page, run_notebook, served, snap

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300), pytest.mark.filterwarnings('default')]


@pytest.fixture(scope='module')
def clusters(browser, lab):
    "The page of clusters.ipynb, run."
    with opened_page(browser) as page:
        run_notebook(page, lab, 'nbs/explore/clusters.ipynb', '.sc-tiles')
        page.wait_for_selector('tr[data-cluster]')
        page.locator('.sc').first.evaluate('e => e.scrollIntoView({block: "start"})')
        yield page


def status(page):
    return page.locator('.sc-status').inner_text()


def says(page, text):
    "Wait until the status line says so."
    page.wait_for_function('text => document.querySelector(".sc-status")?.innerText.includes(text)', arg=text, timeout=30_000)


def press(page, name, words):
    "Press a control as soon as it can be pressed, and wait for what is said then."
    page.wait_for_function(f'!document.querySelector(\'[data-key="{name}"]\').disabled')
    key(page, name).click()
    says(page, words)


def has_clusters(page, n):
    "Wait until the list has that many."
    page.wait_for_function('n => document.querySelectorAll("tr[data-cluster]").length === n', arg=n, timeout=30_000)


def key(page, name):
    return page.locator(f'[data-key="{name}"]')


def show(page, cluster):
    "Show a cluster, and wait until the list says so: it is drawn after the images."
    key(page, f'show{cluster}').click()
    page.wait_for_function('cluster => document.querySelector("tr.sc-shown")?.dataset.cluster === cluster', arg=str(cluster), timeout=30_000)


def at_start(page):
    "Undo everything."
    while key(page, 'undo').is_enabled():
        before = status(page)
        key(page, 'undo').click()
        page.wait_for_function('was => document.querySelector(".sc-status").innerText !== was.text || document.querySelector(\'[data-key="undo"]\').innerText !== was.undo',
                               arg={'text': before, 'undo': key(page, 'undo').inner_text()}, timeout=30_000)


def test_points_are_drawn(clusters):
    "The canvas is not empty: WebGL works, and the points have the colours of the list."
    clusters.wait_for_timeout(1500)
    snap(clusters, 'clusters-start')
    canvas = max(clusters.locator('canvas').all(), key=lambda c: (c.bounding_box() or {'width': 0})['width'])
    assert canvas.bounding_box()['width'] > 300
    from PIL import Image
    import io
    colours = Image.open(io.BytesIO(canvas.screenshot())).convert('RGB').getcolors(2**20)
    assert sum(n for n, (r, g, b) in colours if max(r, g, b) - min(r, g, b) > 60) > 300, 'no coloured points'


def test_showing_a_cluster_shows_its_images(clusters):
    assert clusters.locator('.sc-tile').count() == 60 and clusters.get_by_role('toolbar', name='Images').inner_text().startswith('360 images')       # before anybody chose
    show(clusters, 3)
    size = int(clusters.locator('tr[data-cluster="3"] .sc-num').first.inner_text())
    assert clusters.locator('.sc-tile').count() == min(size, 60)
    assert clusters.locator('tr.sc-shown').get_attribute('data-cluster') == '3'
    picture = clusters.locator('.sc-tile').first.evaluate('e => getComputedStyle(e).backgroundImage')
    assert picture.startswith('url("blob:')


def test_drawing_a_lasso_selects_points(clusters):
    canvas = max(clusters.locator('canvas').all(), key=lambda c: (c.bounding_box() or {'width': 0})['width'])
    show(clusters, 3)
    box = canvas.bounding_box()
    left, top, right, bottom = box['x'] + 12, box['y'] + 12, box['x'] + box['width'] - 12, box['y'] + box['height'] - 12
    clusters.locator('button[title*="asso"], button[aria-label*="asso"]').first.click()
    clusters.mouse.move(left, top, steps=3)
    clusters.mouse.down()
    for corner in ((right, top), (right, bottom), (left, bottom), (left, top + 10)):
        clusters.mouse.move(*corner, steps=6)
        clusters.wait_for_timeout(60)
    snap(clusters, 'clusters-drawing')
    clusters.mouse.up()
    clusters.wait_for_function('document.querySelectorAll(".sc-tile").length === 60 && !document.querySelector("tr.sc-shown")', timeout=30_000)
    assert clusters.get_by_role('toolbar', name='Images').inner_text().startswith('3')             # most of the 360
    snap(clusters, 'clusters-lasso')


def test_rename_merge_export(clusters, repository):
    "What a person does, and the files that come of it."
    at_start(clusters)
    hostile = '<img src=x onerror="document.title=\'pwned\'"> "dogs", 1e5'
    key(clusters, 'name4').fill(hostile)
    key(clusters, 'name4').press('Enter')
    says(clusters, 'cluster 4 is called')
    sizes = [int(clusters.locator(f'tr[data-cluster="{c}"] .sc-num').first.inner_text()) for c in (4, 7)]
    key(clusters, 'tick4').check()
    clusters.wait_for_function('document.querySelector(\'[data-key="tick4"]\').checked')
    key(clusters, 'tick7').check()
    press(clusters, 'merge', '2 clusters are now')
    has_clusters(clusters, 9)
    into, gone = (4, 7) if sizes[0] >= sizes[1] else (7, 4)
    show(clusters, into)
    clusters.locator('.sc-tile').first.click()
    press(clusters, 'reject', '1 image in no cluster')
    key(clusters, 'export').click()
    says(clusters, '360 images written to')
    assert 'curated_result(explorer.curation)' in status(clusters)
    key(clusters, 'save').click()
    says(clusters, '3 edits saved')
    snap(clusters, 'clusters-merged')

    folder = repository/'curated'/'selfclassifier-digits-0'
    rows = list(csv.DictReader((folder/'labels.csv').read_text(encoding='utf-8').splitlines(keepends=True)))
    number = into - (gone < into)                                           # in the files the clusters are counted without the one that is gone
    assert len(rows) == 360 and sum(int(row['cluster']) == number for row in rows) == sum(sizes) - 1
    assert {int(row['cluster']) for row in rows} == {*range(-1, 9)} and [row['source'] for row in rows if row['cluster'] == '-1'] == ['hand']
    names = read_names(folder/'names.yaml')
    assert list(names) == list(range(9)) and names[number] == (hostile if into == 4 else 'cluster 7')
    assert [edit['do'] for edit in json.loads((folder/'session.json').read_text())['edits']] == ['rename', 'merge', 'reject']
    assert clusters.title() != 'pwned' and not clusters.locator('.sc img').count()


def test_refused_names_are_said_and_taken_back(clusters):
    at_start(clusters)
    key(clusters, 'name2').fill('cluster 3')
    key(clusters, 'name2').press('Enter')
    says(clusters, 'merge the two')
    assert clusters.locator('.sc-alarm').count() == 1
    clusters.wait_for_function('document.querySelector(\'[data-key="name2"]\').value === "cluster 2"')


def test_split_gather_refine_undo(clusters):
    at_start(clusters)
    key(clusters, 'tick5').check()
    press(clusters, 'split', 'was split into')
    has_clusters(clusters, 11)
    show(clusters, 10)
    key(clusters, 'all').click()
    press(clusters, 'confirm', 'confirmed')
    key(clusters, 'refine').click()
    says(clusters, 'refined:')
    snap(clusters, 'clusters-refined')
    at_start(clusters)
    has_clusters(clusters, 10)


def test_keyboard_alone(clusters):
    "Tab reaches every control in the order of the page; arrows walk among the images; a key is not JupyterLab's."
    at_start(clusters)
    cells = clusters.locator('.jp-Cell').count()
    show(clusters, 0)
    key(clusters, 'save').focus()
    reached = []
    for _ in range(120):
        clusters.keyboard.press('Tab')
        reached.append(clusters.evaluate('document.activeElement.dataset.key ?? document.activeElement.tagName'))
        if reached[-1].startswith('tile'):
            break
    assert {'export', 'colour', 'low', 'high', 'parts', 'tick0', 'name0', 'show0', 'tick9', 'show9', 'order', 'all'} <= set(reached), reached
    outline = clusters.evaluate('(() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]; })()')
    assert outline[0] == 'solid' and outline[1] >= 2
    first = clusters.evaluate('document.activeElement.dataset.key')
    clusters.keyboard.press('ArrowRight')
    clusters.wait_for_function('was => document.activeElement.dataset.key?.startsWith("tile") && document.activeElement.dataset.key !== was', arg=first)
    clusters.keyboard.press('Space')
    clusters.wait_for_function('document.querySelectorAll(".sc-tile[aria-pressed=true]").length === 1 && !document.querySelector(\'[data-key="near"]\').disabled')
    assert clusters.evaluate('document.activeElement.getAttribute("aria-pressed")') == 'true', 'the focus was lost'
    for pressed in ('x', 'd', 'd', 'b'):
        clusters.keyboard.press(pressed)
    assert clusters.locator('.jp-Cell').count() == cells
    picked = clusters.evaluate('document.activeElement.dataset.image')
    for _ in range(30):                                                     # back to the bar of the images
        clusters.keyboard.press('Shift+Tab')
        if clusters.evaluate('document.activeElement.dataset.key') == 'near':
            break
    clusters.keyboard.press('Enter')
    says(clusters, 'the 60 images nearest to')
    clusters.wait_for_function('first => document.querySelector(".sc-tile").dataset.image === first', arg=picked)
    assert clusters.locator('.sc-tile').count() == 60 and not clusters.locator('tr.sc-shown').count()
    assert clusters.evaluate('document.activeElement.className') == 'sc-tile', 'a button that is switched off by its own press hands the focus to the images'
    snap(clusters, 'clusters-keyboard')


def test_what_is_typed_survives_a_redraw(clusters):
    "The name of a new cluster, half typed, while something else on the page changes; and the field is free again once the cluster is made."
    at_start(clusters)
    show(clusters, 0)
    key(clusters, 'newname').fill('odd on')
    clusters.locator('.sc-tile').first.click()
    clusters.wait_for_function('!document.querySelector(\'[data-key="gather"]\').disabled')
    assert key(clusters, 'newname').input_value() == 'odd on'
    key(clusters, 'newname').focus()
    clusters.keyboard.press('End')
    clusters.keyboard.type('es')
    key(clusters, 'tick3').check()
    key(clusters, 'target').select_option('4')
    key(clusters, 'order').select_option('surest')
    clusters.wait_for_function('document.querySelector(\'[data-key="merge"]\').disabled === true && document.querySelector(\'[data-key="split"]\').disabled === false')
    assert (key(clusters, 'newname').input_value(), key(clusters, 'target').input_value()) == ('odd ones', '4')
    press(clusters, 'gather', '1 image in a new cluster')
    clusters.wait_for_function('document.querySelector(\'[data-key="newname"]\').value === ""')
    assert clusters.locator('tr[data-cluster="10"] .sc-name').input_value() == 'odd ones'
    press(clusters, 'undo', 'gather undone')
    has_clusters(clusters, 10)


CONTRAST = '''() => {
  const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, below) => below.map((v, i) => v * (1 - top[3]) + top[i] * top[3]);
  const paper = (e) => { const layers = []; for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3]) layers.push(c); if (c[3] === 1) break; }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]); };
  return [...document.querySelectorAll('.sc *')].filter((e) => e.checkVisibility() && ([...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || /^(INPUT|SELECT)$/.test(e.tagName)) && e.type !== 'checkbox')
    .map((e) => { const below = paper(e), ink = over(rgba(getComputedStyle(e).color), below), [a, b] = [light(ink), light(below)]; return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + ' ' + (e.innerText || e.value).slice(0, 30)]; });
}'''


def test_contrast(clusters):
    "WCAG AA: 4.5 to 1 for text, computed from what is on the page, in both themes of JupyterLab, while a refusal is shown; 3 to 1 for frames and for the colours of clusters."
    key(clusters, 'name2').fill('cluster 3')
    key(clusters, 'name2').press('Enter')
    says(clusters, 'merge the two')
    clusters.locator('.sc summary').click()
    for theme in ('light', 'dark'):
        clusters.evaluate('dark => { document.body.dataset.jpThemeLight = !dark; }', theme == 'dark')
        measured = clusters.evaluate(CONTRAST)
        assert len(measured) > 60 and min(measured)[0] >= 4.5, sorted(measured)[:5]
        assert any('merge the two' in what or what.startswith('DIV') for _, what in measured)
    colours = clusters.evaluate("""() => ['.sc button', '.sc input', '.sc select'].map((which) => getComputedStyle(document.querySelector(which)).borderTopColor)
        .concat([...document.querySelectorAll('.sc-dot')].map((e) => getComputedStyle(e).backgroundColor))""")
    ratios = [(contrast([int(v) / 255 for v in re.findall(r'\d+', colour)[:3]]), colour) for colour in colours]
    assert len(ratios) > 10 and min(ratios)[0] >= 3, min(ratios)
    clusters.locator('.sc summary').evaluate('e => e.scrollIntoView({block: "center"})')
    snap(clusters, 'clusters-classes')
    clusters.locator('.sc summary').click()


def test_every_control_has_a_name(clusters):
    "Also what can be reached without being a control (scrolling lists, the fold), and no two controls of a panel are called the same."
    nameless = clusters.evaluate('''() => [...document.querySelectorAll('.sc button, .sc input, .sc select, .sc summary, .sc [tabindex]')]
        .filter((e) => !(e.getAttribute('aria-label') || e.innerText?.trim() || e.labels?.length)).map((e) => e.outerHTML.slice(0, 120))''')
    assert not nameless, nameless
    twice = clusters.evaluate('''() => [...document.querySelectorAll('.sc')].flatMap((panel) => { const names = [...panel.querySelectorAll('button:not(.sc-tile), input, select')]
        .map((e) => e.getAttribute('aria-label') || e.labels?.[0]?.firstChild.textContent || e.innerText); return names.filter((n, i) => names.indexOf(n) !== i); })''')
    assert not twice, twice
    assert clusters.evaluate("[...document.querySelectorAll('.sc th')].every((e) => e.textContent.trim() || e.getAttribute('aria-label'))"), 'a column without a head'


def test_no_column_of_the_list_is_cut(clusters):
    assert clusters.locator('.sc-scroll').first.evaluate('e => e.scrollWidth <= e.clientWidth')


def test_the_focus_goes_with_the_page(clusters):
    "From top to bottom and from left to right, as the controls lie on the page."
    key(clusters, 'undo').evaluate('e => e.scrollIntoView()')
    order = clusters.evaluate("""() => [...document.querySelectorAll('.sc')].filter((e) => e.checkVisibility()).flatMap((panel) =>
        [...panel.querySelectorAll('.sc-bar button, .sc-bar input, .sc-bar select')].map((e) => { const box = e.getBoundingClientRect(); return [[...document.querySelectorAll('.sc')].indexOf(panel), Math.round((box.top + box.bottom) / 20), box.left]; }))""")
    assert len(order) > 20 and order == sorted(order), order
    assert clusters.evaluate("[...document.querySelectorAll('.sc [tabindex]')].every((e) => e.tabIndex <= 0)")


def test_nothing_was_asked_for_or_complained_about(clusters):
    assert clusters.asked == [] and clusters.complaints == []
    assert failures(clusters) == []


@pytest.mark.parametrize('name', ['views', 'compare', 'loss'])
def test_notebooks_for_people(page, lab, name):
    "Each runs from top to bottom, shows its picture, and answers to a control."
    shown = {'views': '.widget-image', 'compare': '.jupyter-widgets .jp-OutputArea img', 'loss': '.widget-image'}[name]
    run_notebook(page, lab, f'nbs/explore/{name}.ipynb', shown)
    picture = page.locator(shown).first
    before = picture.get_attribute('src')
    if name == 'compare':
        page.locator('.widget-dropdown select').nth(1).select_option('nmi')
    else:
        handle = page.locator('.widget-slider .noUi-handle').nth(3)
        handle.scroll_into_view_if_needed()
        handle.focus()
        for _ in range(5):
            page.keyboard.press('ArrowRight')
    page.wait_for_function('([which, was]) => { const e = document.querySelector(which); return e && e.src !== was; }', arg=[shown, before], timeout=30_000)
    picture.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    snap(page, name)
    assert failures(page) == [] and page.asked == [] and page.complaints == []


@pytest.fixture(scope='module')
def voila(repository, tmp_path_factory):
    "The explorer as an application of its own; the address."
    port = free_port()
    options = [f'--port={port}', '--no-browser', '--Voila.ip=127.0.0.1', '--enable_nbextensions=False', '--template=local']
    with served(['voila', 'nbs/explore/clusters.ipynb', *options], repository, f'http://127.0.0.1:{port}/voila/static/', tmp_path_factory.mktemp('voila'), JUPYTER_PATH=str(repository/'nbs'/'explore')):
        yield f'http://127.0.0.1:{port}/'


WIDER = """() => [...document.querySelectorAll('.sc, .sc *')].filter((e) => !e.closest('.sc-scroll') && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 90))"""


@pytest.mark.parametrize('width', [1280, 390])
def test_voila(browser, voila, width):
    "With our template it asks nobody for anything, not even for icons; on a telephone everything is there, below each other, and no row of the list is cut."
    with opened_page(browser, viewport={'width': width, 'height': 1300}) as page:
        page.goto(voila)
        page.wait_for_selector('tr[data-cluster]', timeout=120_000)
        show(page, 1)
        page.wait_for_timeout(1500)
        page.locator('.sc-scroll').first.evaluate('e => e.scrollIntoView({block: "center"})')
        snap(page, f'voila-{width}')
        assert page.locator('.sc-scroll').first.evaluate('e => e.scrollWidth <= e.clientWidth')
        assert page.asked == [] and page.complaints == []
        assert page.evaluate(WIDER) == [] and page.evaluate('document.scrollingElement.scrollWidth <= innerWidth')


def test_without_a_run(page, lab, repository):
    "A fresh clone: one line that says what to run, and no traceback."
    hidden = (repository/'out').rename(repository/'hidden')
    try:
        run_notebook(page, lab, 'nbs/explore/clusters.ipynb')
        assert any('make repro' in text for text in page.locator('.jp-OutputArea-output').all_inner_texts()) and failures(page) == []
    finally:
        hidden.rename(repository/'out')
