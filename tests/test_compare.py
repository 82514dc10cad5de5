"""The comparison page: every method that params.yaml names, nothing else, and no sentence or cell that the numbers do not carry."""
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from conftest import ROOT, cells_of, python, source_of
from selfclass.core import load_json, save_arrays, save_json
from selfclass.errors import DataError, ParamsError
from selfclass.figures import method_figures, timed_figure
from selfclass.metrics import cluster_scores
from selfclass.report import (METHOD_COLUMNS, TIMED, alt_text, conclusions, load_methods, methods_csv, methods_markdown, methods_page, methods_summary, methods_table,
                              save_figure, time_said)

N, SEEDS = 300, [0, 1, 2]
TRUTH = np.arange(N) % 10
METHODS = {'alone': {'epochs': 30}, 'forty <b>': {'module': 'alone', 'epochs': 20}, 'taught': {'module': 'sclre', 'superclasses': 'parity', 'epochs': 10}}
DERIVE = {'again': {'module': 'scan', 'from': 'out/pretrain/alone', 'clustering': {'epochs': 5}, 'selflabel': {'epochs': 10}}, 'centres': {'module': 'kmeans', 'from': 'out/embed/alone'},
          'raw': {'module': 'kmeans', 'from': 'data'}, 'never': {'module': 'kmeans', 'from': 'out/embed/taught'}}
MADE = {'alone': (.80, 10, 60.), 'forty <b>': (.85, 40, 40.), 'taught': (.97, 2, 20.), 'again': (.95, 10, 9.), 'centres': (.82, 10, .4), 'raw': (.6, 10, .2)}


def leave_methods(out, logs=True, seeds=SEEDS, data='digits'):
    "The folders of six methods, one of forty clusters, one of two superclasses; their scores are true ones."
    rng = np.random.default_rng(1)
    for name, (right, k, seconds) in MADE.items():
        scores, derived = {}, name in DERIVE
        for seed in seeds:
            share = right - .02 * seed
            noise, labels = rng.random(N) < share, TRUTH % 2 if k == 2 else TRUTH
            named = labels if k == 2 else (TRUTH + 3) % 10 + 10 * (np.arange(N) // 10 % (k // 10))
            ids = np.where(noise, named, rng.integers(0, k, N))
            folder = out/('derive' if derived else 'pretrain')/name/f'{data}-{seed}'
            save_arrays(out/('derive' if derived else 'embed')/name/data/f'{seed}.npz', classes=[7, k], test_labels=TRUTH)
            if name not in ('centres', 'raw'):
                save_arrays(folder/'predictions.npz', epoch=[2, 4], test=np.stack([[ids * 0, ids * 0], [ids * 0, ids]]))
            if name == 'again':
                save_arrays(folder/'before_selflabel.npz', test=np.stack([ids * 0, np.where(rng.random(N) < .9, ids, 0)]))
            if k == 2:
                save_arrays(folder/'superclasses.npz', test_label=labels)
            found = {'superclass_acc': float((ids == labels).mean())} if k == 2 else cluster_scores(ids, TRUTH, k)
            if k == 40:
                del found['acc']
            scores[str(seed)] = {'best_head': 1, 'confidence': .9, 'margin': 1. if name == 'centres' else .8} | found
            if logs and not derived:
                save_json({'train_s': seconds + seed, 'images_per_s': 1000.}, out/'log'/'pretrain'/f'{data}-{name}-{seed}.json')
        save_json(scores, out/('derive' if derived else 'cluster')/name/f'{data}.json')
        if logs and derived:
            save_json({f'{data}-{seed}': {'derive_s': seconds} for seed in seeds} | {'wall_s': 99.}, out/'log'/'derive'/f'{name}.json')
        if not derived:
            save_json({str(seed): {'knn_top1': .9, 'linear_top1': .9 + .01 * seed} for seed in seeds}, out/'linear'/name/f'{data}.json')
    return out


def loaded(out, methods=METHODS, derive=DERIVE, seeds=SEEDS, datasets=None):
    return load_methods(out, datasets or {'digits': {}}, methods, derive, seeds)


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    return leave_methods(tmp_path_factory.mktemp('compare'))


@pytest.fixture(scope='module')
def found(out):
    return loaded(out)


def cells(methods, columns=tuple(METHOD_COLUMNS)):
    table = methods_table(methods, columns)
    return {(row[0].text, column): (cell.text, [table.notes[mark - 1] for mark in cell.marks]) for row in table.rows for column, cell in zip(table.columns, row)}


def test_whatever_params_name_is_a_row_in_that_order(found):
    assert [row[0].text for row in methods_table(found).rows] == [*METHODS, *DERIVE]
    assert {runs.method: runs.derived for runs in found} == {name: name in DERIVE for name in (*METHODS, *DERIVE)}


def test_a_row_says_what_the_method_was_given(found):
    cell = cells(found)
    assert {name: cell[name, 'labels used'][0] for name in MADE} == dict.fromkeys(MADE, 'none') | {'taught': 'superclasses'}
    assert [cell[name, 'starts from'][0] for name in ('alone', 'again', 'centres', 'raw')] == ['random weights', 'network of alone', 'features of alone', 'pixels']
    assert cell['forty <b>', 'heads'][0] == '7, 40' and cell['again', 'epochs'][0] == '5 + 10'


def test_cells_are_means_of_the_seeds(found, out):
    for runs in found:
        for column, metric in (('ACC', 'acc'), ('NMI', 'nmi')):
            stage = 'derive' if runs.derived else 'cluster'
            if runs.method in ('alone', 'again', 'centres', 'raw'):
                numbers = [load_json(out/stage/runs.method/'digits.json')[str(seed)][metric] for seed in SEEDS]
                assert cells(found)[runs.method, column][0] == f'{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}'


def test_another_number_of_clusters_is_scored_many_to_one_only(found):
    cell = cells(found)
    for column in ('ACC', 'NMI', 'ARI'):
        assert cell['forty <b>', column][0] == '–' and '40 clusters' in cell['forty <b>', column][1][0]
    assert re.match(r'0\.\d{3} ± ', cell['forty <b>', 'many to one'][0])


def test_the_supervised_stand_apart(found):
    cell, told = cells(found), conclusions(found)
    assert all(cell['taught', column][0] == '–' for column in ('ACC', 'many to one', 'NMI', 'ARI')) and re.match(r'0\.9', cell['taught', 'superclass ACC'][0])
    assert [text for text in told if 'taught' in text and 'Taught' not in text] == []
    assert any(text.startswith('Taught superclasses') and 'taught (2 superclasses)' in text for text in told)
    assert not any(column == 'superclass ACC' for _, column in cells([runs for runs in found if runs.method != 'taught']))


def test_no_dash_without_a_reason_and_no_reason_unused(found):
    table = methods_table(found)
    assert all(cell.marks or cell.text != '–' for row in table.rows for cell in row)
    assert {mark for row in table.rows for cell in row for mark in cell.marks} == set(range(1, len(table.notes) + 1))
    assert all('not run' in cells(found)['never', column][1][0] for column in ('ACC', 'linear', 'superclass ACC'))
    assert 'the stage linear' in cells(found)['centres', 'k-NN'][1][0]


def test_curves_end_at_the_numbers_of_the_table(found):
    for runs in found:
        assert bool(runs.curves) == (runs.method in ('alone', 'forty <b>', 'taught', 'again'))
        for seed, curve in runs.curves.items():
            assert curve['accuracy'][-1] == pytest.approx(runs.scores[seed][runs.measure], abs=1e-6) and list(curve['epoch']) == [2, 4]


def test_time_includes_what_a_method_starts_from(found, out, tmp_path):
    cell = cells(found)
    assert cell['alone', 'seconds per seed'][0] == '61.0' and cell['again', 'seconds per seed'][0] == '70.0 = 61.0 + 9.0' and cell['raw', 'seconds per seed'][0] == '0.2'
    bare = loaded(leave_methods(tmp_path, logs=False))
    assert all(cells(bare)[name, 'seconds per seed'] == ('not timed here', []) for name in MADE) and timed_figure(bare) is None and time_said(bare) == []
    save_json({f'digits-{seed}': {'derive_s': 9.} for seed in SEEDS}, tmp_path/'log'/'derive'/'again.json')
    assert cells(loaded(tmp_path))['again', 'seconds per seed'][0] == 'not timed here'                # its own time alone would be a wrong sum
    chain = loaded(out, derive=DERIVE | {'raw': {'module': 'scan', 'from': 'out/derive/again'}})
    assert cells(chain)['raw', 'seconds per seed'][0] == '70.2 = 70.0 + 0.2'


def test_conclusions_follow_the_numbers(found, tmp_path):
    said = next(text for text in conclusions(found) if text.startswith('ACC without labels'))
    assert 'again has the highest mean' in said and 'raw the lowest' in said and said.endswith('do not overlap.')
    here = leave_methods(tmp_path)
    scores = load_json(here/'derive'/'raw'/'digits.json')
    save_json({seed: run | {'acc': .99} for seed, run in scores.items()}, here/'derive'/'raw'/'digits.json')
    said = next(text for text in conclusions(loaded(here)) if text.startswith('ACC without labels'))
    assert 'raw has the highest mean, 0.990 ± 0.000 (n = 3); again the second' in said and 'centres the lowest' not in said and 'alone the lowest' in said
    save_json({seed: run | {'acc': .5 + .4 * int(seed)} for seed, run in scores.items()}, here/'derive'/'raw'/'digits.json')
    assert next(text for text in conclusions(loaded(here)) if text.startswith('ACC')).endswith('first two overlap.')


def test_the_three_questions_have_sentences(found):
    told, by_name = ' '.join(conclusions(found)), {runs.method: runs for runs in found}
    before, after = ([values[str(seed)] for seed in SEEDS] for values in (by_name['again'].before, {seed: run['acc'] for seed, run in by_name['again'].scores.items()}))
    steps = ', '.join(f'{b - a:+.3f}' if round(b - a, 3) else '0.000' for a, b in zip(before, after))
    assert f'Self-labelling took the accuracy of again from {np.mean(before):.3f} ± {np.std(before, ddof=1):.3f} (n = 3)' in told and f'by seed: {steps}.' in told
    means = {name: np.mean([run['acc'] for run in by_name[name].scores.values()]) for name in ('alone', 'centres', 'raw')}
    assert f"centres starts from the features of alone: ACC {means['centres']:.3f}" in told and f"{means['centres'] - means['raw']:+.3f}" in told
    assert told.endswith('Not run: never.')


def test_no_word_that_no_number_carries(found):
    told = ' '.join(conclusions(found) + time_said(found))
    assert not re.search(r'(?i)\b(better|best|worse|superior|clear|clearly|strong|impressive|outperform\w*|significantly|state of the art|robust|only)\b', told)
    assert 'no test of significance was made' in told
    assert not re.search(r'\d\.\d{3}(?! \(n| ±|\d|,|\.|$)', re.sub(r'[+-]\d\.\d{3}', '', told)), 'each mean has its n'


def test_unlabelled_images_have_no_accuracy_and_no_figure(tmp_path):
    save_json({'0': {'best_head': 0, 'silhouette': .4}}, tmp_path/'cluster'/'alone'/'mine.json')
    mine = load_methods(tmp_path, {'mine': {}}, {'alone': {'epochs': 3}}, {}, [0])
    assert cells(mine)['alone', 'ACC'] == ('–', ['these images have no labels']) and method_figures(mine) == []
    assert 'silhouette' in methods_page('t', mine, {})


def test_damaged_and_doubled_are_refused(tmp_path):
    here = leave_methods(tmp_path, seeds=[0])
    with pytest.raises(ParamsError, match="'raw' stands in methods and in derive"):
        loaded(here, methods=METHODS | {'raw': {}})
    (here/'pretrain'/'alone'/'digits-0'/'predictions.npz').write_bytes(b'PK\x03\x04torn')
    with pytest.raises(DataError, match='predictions.npz is not a whole .npz'):
        loaded(here, seeds=[0])
    (here/'pretrain'/'alone'/'digits-0'/'predictions.npz').unlink()
    assert loaded(here, seeds=[0])[0].curves == {}
    with pytest.raises(ParamsError, match="did you mean 'linear'|no column 'linaer'"):
        methods_table(loaded(here, seeds=[0]), ['linaer'])


def test_seeds_that_are_not_named_are_left_alone(out):
    assert all(set(runs.scores) <= {'0', '2'} and set(runs.seconds) <= {'0', '2'} for runs in loaded(out, seeds=[0, 2]))


class Page(HTMLParser):
    "Tags, whether they close, the texts of table cells."

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ('meta', 'img', 'br'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(found, tmp_path):
    figures = [(save_figure(figure, tmp_path/name)[0], caption, alt_text(figure)) for name, figure, caption in method_figures(found)]
    assert [path.stem for path, *_ in figures] == ['measures', 'epochs', 'confidence']
    timed = timed_figure(found)
    page = methods_page('all', found, {'digits': [*figures, (timed[0], timed[1], alt_text(timed[0]))]})
    read = Page(page)
    tags = [tag for tag, _ in read.found]
    assert not read.open and tags.count('img') == 4 and tags.count('figcaption') == 4 and not {'script', 'link', 'iframe', 'object', 'b'} & set(tags)
    assert all(attrs['src'].startswith('data:image/') and len(attrs['alt']) > 60 for tag, attrs in read.found if tag == 'img')
    assert not re.search(r'https?://(?!www\.w3\.org)|@import|url\(', re.sub(r'base64,[^"]*', '', page))
    assert page.index('what was measured') < page.index('<table') < page.index('<img') and '<meta name="viewport"' in page
    assert all(path.with_suffix('.png').stat().st_size < 150_000 for path, *_ in figures) and len(page) < 1_500_000


def test_figures_show_what_the_table_shows(found):
    drawn = {name: figure for name, figure, _ in method_figures(found)}
    panels = {ax.get_title(): ax for ax in drawn['measures'].axes if ax.get_visible()}
    assert list(panels) == ['ACC', 'many to one', 'NMI', 'ARI', 'k-NN', 'linear', 'superclass ACC']
    dots = {title: sum(len(line.get_xdata()) for line in ax.lines) for title, ax in panels.items()}
    assert dots['ACC'] == 12 and dots['many to one'] == 15 and dots['superclass ACC'] == 3 and dots['linear'] == 9           # a dot per method and seed
    assert [ax.get_ylabel() for ax in drawn['epochs'].axes] == ['clustering accuracy', 'superclass accuracy']
    names = [text.get_text() for text in drawn['epochs'].axes[0].texts if text.get_text()]
    assert names == ['alone', 'forty <b> (many to one)', 'again']
    assert 'centres' not in alt_text(drawn['confidence']) and 'again' in alt_text(drawn['confidence'])                     # no probabilities, no confidence
    seconds = timed_figure(found)[0].axes[0]
    assert any(np.allclose(line.get_xdata(), 70.) for line in seconds.lines) and seconds.get_xscale() == 'log'


def test_names_at_the_ends_do_not_touch(out):
    many = {f'method number {i}': {'epochs': 3} for i in range(9)}
    runs = loaded(out)[0]
    twins = [type(runs)(**vars(runs) | {'method': name}) for name in many]
    for figure in (method_figures(twins)[1][1], timed_figure(twins)[0]):
        boxes = sorted((box.y0, box.y1) for text in figure.axes[0].texts if text.get_text() and (box := text.get_window_extent()))
        assert len(boxes) == 9 and all(a[1] <= b[0] + 1 for a, b in zip(boxes, boxes[1:]))


STAGE = '\n'.join(source_of(cell) for cell in cells_of(ROOT/'nbs'/'pipeline'/'compare.ipynb') if cell['cell_type'] == 'code')


def run_stage(folder, logs):
    "The stage on made-up runs of two data sets, in an empty repository; what it wrote."
    (folder/'settings.ini').symlink_to(ROOT/'settings.ini')
    for data in ('digits', 'other'):
        leave_methods(folder/'out', logs, data=data)
    given = f'datasets, methods, derive, seeds = {dict(digits={}, other={})!r}, {METHODS!r}, {DERIVE!r}, {SEEDS!r}\n'
    parameters = next(source_of(cell) for cell in cells_of(ROOT/'nbs'/'pipeline'/'compare.ipynb') if cell['metadata'].get('tags'))
    ran = python('-W', 'error', '-c', STAGE.replace(parameters, parameters + '\n' + given), cwd=folder, MPLBACKEND='agg')
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout, {str(file.relative_to(folder/'out'/'compare')): file.read_bytes() for file in sorted((folder/'out'/'compare').rglob('*')) if file.is_file()}


def test_the_stage_writes_the_same_bytes_but_for_the_page(tmp_path):
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    (said, first), (said_again, second) = run_stage(tmp_path/'a', logs=True), run_stage(tmp_path/'b', logs=False)
    assert set(first) == set(second) and [name for name in first if first[name] != second[name]] == ['index.html'] and said == said_again
    assert b'not timed here' in second['index.html'] and b'61.0' in first['index.html']
    outs = [out for kind in ('outs', 'metrics') for out in yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages']['compare'][kind]]
    declared = {out.removeprefix('out/compare/') for out in outs if out.startswith('out/compare/')}
    assert {name.split('/')[0] for name in first} == declared
    assert {f'figures/{data}-{name}.{end}' for data in ('digits', 'other') for name in ('measures', 'epochs', 'confidence') for end in ('svg', 'png')} < set(first)
    summary = load_json(tmp_path/'a'/'out'/'compare'/'summary.json')
    accs = [load_json(tmp_path/'a'/'out'/'derive'/'again'/'other.json')[str(seed)]['acc'] for seed in SEEDS]
    assert summary['other/again/acc'] == {'mean': pytest.approx(np.mean(accs), abs=1e-6), 'sd': pytest.approx(np.std(accs, ddof=1), abs=1e-6),
                                          'min': pytest.approx(min(accs), abs=1e-6), 'max': pytest.approx(max(accs), abs=1e-6), 'n': 3}
    assert not any(name in text for text in (first['methods.md'].decode(), first['methods.csv'].decode()) for name in TIMED)


def test_files_hold_every_score(found):
    summary = methods_summary(found)
    assert {key.split('/')[1] for key in summary} == set(MADE) and 'digits/taught/superclass_acc' in summary and 'digits/forty <b>/nmi' in summary
    assert methods_csv(found).count('\n') == 1 + len(summary)
    text = methods_markdown(methods_table(found))
    assert '&lt;b&gt;' in text and '<b>' not in text and '- <sup>a</sup> ' in text
