"""Published numbers: nothing was lost on the way from the papers, every table renders, and ours land in the right cells or in none."""
import csv
import io
import json
import re

import pytest
import yaml
from conftest import ROOT, cells_of, python, source_of
from selfclass.core import load_json, read_yaml, save_json
from selfclass.errors import DataError, ParamsError
from selfclass.published import Number, published, published_data, published_tables
from selfclass.report import compare, comparison_csv, comparison_html, comparison_latex, comparison_markdown, comparison_page, comparisons, not_run, pipeline_scores

FACTS = ROOT.parent/'shared'/'facts'/'published_results.yaml'                # beside the repository where it was written; elsewhere the counts below stand for it
# rows, cells with a number, dashes, rows in doubt; counted in the collected facts
COUNTS = {
    'self-classifier/1': (14, 56, 0, 0), 'self-classifier/2': (8, 48, 0, 0), 'self-classifier/3': (8, 128, 0, 0),
    'self-classifier/4': (13, 34, 18, 0), 'self-classifier/5': (7, 17, 0, 0), 'self-classifier/6': (2, 4, 0, 0), 'self-classifier/7': (7, 14, 0, 2),
    'self-classifier/8': (4, 8, 0, 0), 'self-classifier/9': (5, 10, 0, 0), 'self-classifier/10': (4, 6, 2, 0), 'self-classifier/11': (4, 8, 0, 0),
    'self-classifier/12': (6, 54, 0, 0), 'sela/1': (9, 25, 0, 0), 'sela/2': (11, 31, 2, 0), 'sela/3': (13, 115, 15, 0), 'sela/4': (10, 17, 3, 0),
    'sela/5': (6, 30, 0, 0), 'sela/6': (21, 195, 15, 0), 'sela/7': (13, 20, 6, 0), 'sela/readme': (7, 31, 4, 0), 'sela/text': (4, 4, 0, 0),
    'kmeans/1': (15, 74, 1, 1), 'kmeans/2': (12, 48, 0, 0), 'kmeans/c2': (12, 60, 0, 0), 'kmeans/a1': (15, 24, 6, 0), 'kmeans/text': (3, 3, 0, 0),
    'scan/1': (5, 5, 0, 1), 'scan/2': (3, 3, 0, 0), 'scan/3': (21, 171, 18, 1), 'scan/4': (4, 45, 3, 0), 'scan/s1': (6, 72, 0, 0),
    'scan/s2': (3, 33, 3, 0), 'scan/s3': (7, 21, 0, 0), 'scan/s4': (14, 22, 6, 0), 'scan/s5': (4, 8, 0, 0), 'scan/readme': (13, 40, 0, 0),
    'scan/text': (4, 10, 0, 0), 'sclre/main-1': (4, 12, 0, 0), 'sclre/main-2': (4, 16, 0, 0), 'sclre/3': (3, 9, 0, 0), 'sclre/4': (17, 27, 7, 6),
    'sclre/5': (4, 8, 0, 0), 'sclre/6': (6, 30, 0, 2),
}
KINDS = (comparison_markdown, comparison_html, comparison_latex)


def counted(table):
    cells = [cell for row in table.rows for cell in row.cells.values()]
    return len(table.rows), sum(cell is not None for cell in cells), sum(cell is None for cell in cells), sum(bool(row.doubt) for row in table.rows)


def test_every_table_is_there():
    assert set(published_tables()) == set(COUNTS)
    papers = {'self-classifier': 12, 'sela': 9, 'kmeans': 5, 'scan': 11, 'sclre': 6}
    assert {paper: sum(name.startswith(f'{paper}/') for name in COUNTS) for paper in papers} == papers
    assert {f'self-classifier/{i}' for i in range(1, 13)} | {f'sela/{i}' for i in range(1, 8)} < set(COUNTS)


@pytest.mark.parametrize('name', COUNTS)
def test_rows_cells_and_dashes(name):
    assert counted(published(name)) == COUNTS[name]


def test_the_file_is_small_and_has_no_nan():
    file = ROOT/'selfclass'/'published.json'
    assert file.stat().st_size < 90_000
    json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f'{word} in published.json'))


def numbers_of(value):
    "All numbers of a tree, words like `about 66` included, sorted; labels that are numbers count too."
    if isinstance(value, dict):
        return sorted(n for key, v in value.items() if key not in ('note', 'notes', 'why', 'uncertain', 'caption', 'copied_from') for n in numbers_of(v))
    if isinstance(value, (list, tuple)):
        return sorted(n for v in value for n in numbers_of(v))
    if isinstance(value, str) and (about := re.fullmatch(r'about (\d+)( nats)?', value)):
        return [float(about[1])]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.skipif(not FACTS.exists(), reason='the collected facts lie beside the repository of the authors only')
@pytest.mark.parametrize('paper', ['self_classifier', 'sela', 'kmeans', 'scan', 'sclre'])
def test_every_number_of_the_facts_is_in_the_package(paper):
    facts, ours = yaml.safe_load(FACTS.read_text())[paper], load_json(ROOT/'selfclass'/'published.json')['tables']
    for name, table in facts.items():
        short = {'official_readme': 'readme', 'text_numbers': 'text'}.get(name) or name.removeprefix('main_').removeprefix('table_')
        key = f"{paper.replace('_', '-')}/{'main-' if name.startswith('main_') else ''}{short}"
        body = {k: v for k, v in ours[key].items() if k in ('rows', 'fixed')}
        rows = [{k: v for k, v in row.items() if k not in ('runs', 'cells')} for row in body.pop('rows')]
        if key == 'scan/s4':                    # the facts keep this one with the recipes
            continue
        assert numbers_of([rows, body]) == numbers_of({k: v for k, v in table.items() if k not in ('split', 'dataset', 'metrics')}), key
        doubts = [row for part in table.values() if isinstance(part, list) for row in part if isinstance(row, dict) and row.get('uncertain')] if isinstance(table, dict) else []
        assert len(doubts) == sum(bool(row.get('uncertain')) for row in ours[key]['rows']), key


@pytest.mark.parametrize('name', COUNTS)
def test_every_table_renders(name):
    found = compare(None, name)
    for write in KINDS:
        text = write(found)
        assert not re.search(r'[>&|]\s*(None|nan|NaN|null|True|False)\s*[<&|\\]', text), write.__name__
        assert found.table.source.split(':')[0] in text and found.table.title in text
    tex = comparison_latex(found)
    bare = re.sub(r'\\[\\{}%&#_$]', '', tex)
    depth = 0
    for sign in bare:
        depth += (sign == '{') - (sign == '}')
        assert depth >= 0
    assert depth == 0 and bare.count('$') % 2 == 0 and tex.isascii()
    assert re.findall(r'\\(begin|end)\{(\w+)\}', tex) == [('begin', 'table'), ('begin', 'tabular'), ('end', 'tabular'), ('end', 'table')]
    width = len(found.table.labels) + len(found.table.columns)
    body = tex.split(r'\toprule')[1].split(r'\bottomrule')[0].replace(r'\&', '').splitlines()
    assert all(line.count('&') + 1 + sum(int(n) - 1 for n in re.findall(r'\\multicolumn\{(\d+)\}', line)) == width for line in body if line.endswith(r'\\'))
    rows = list(csv.DictReader(io.StringIO(comparison_csv(found))))
    states = [row['state'] for row in rows if row['who'] == 'published']
    assert (states.count('number'), states.count('dash')) == COUNTS[name][1:3]
    assert {row['state'] for row in rows if row['who'] == 'ours'} == {'not run'}
    doubted = [row for row in rows if 'uncertain: ' in row['notes'] and row['who'] == 'published']
    assert bool(doubted) == any(row.doubtful for row in found.table.rows)


def test_doubts_are_footnotes_of_their_cells():
    found = compare(None, 'kmeans/1')
    marked = [(line.labels[0].text, column) for line in found.lines for column, cell in zip(found.table.columns, line.cells) if cell.marks]
    assert marked == [('Self-label', 'NMI')]
    assert any('65.7' in note and note.startswith('uncertain: ') for note in found.footnotes)
    assert re.search(r'75\.40<sup>[a-z]</sup>', comparison_html(found)) and re.search(r'75\.40\$\^\{[a-z]\}\$', comparison_latex(found))


RUN = {'acc': .372, 'nmi': .712, 'ami': .492, 'ari': .261, 'level2/acc': .857, 'level6/acc': .467, 'entity13/acc': .844, 'nonliving26/ami': .57, 'knn_top1': .617, 'linear_top1': .724, 'best_head': 0, 'n_clusters': 1000}


def ours_of(found):
    return [{column: cell.text for column, cell in zip(found.table.columns, line.cells)} for line in found.lines if line.ours]


def test_an_imagenet_run_takes_its_places_in_tables_1_to_3():
    assert ours_of(compare(RUN, 'self-classifier/1')) == [{'NMI': '71.2', 'AMI': '49.2', 'ARI': '26.1', 'ACC': '37.2'}]
    assert ours_of(compare(RUN, 'self-classifier/2')) == [{'10': '85.7', '29': 'not run', '128': 'not run', '466': 'not run', '591': '46.7', '1000': '37.2'}]
    three = ours_of(compare(RUN, 'self-classifier/3'))[0]
    assert three['entity13/ACC'] == '84.4' and three['nonliving26/AMI'] == '57.0' and list(three.values()).count('not run') == 14
    assert ours_of(compare(RUN, 'self-classifier/4', epochs=100)) == [{'100': '72.4', '200': 'not run', '400': 'not run', '800': 'not run'}]


def test_saved_predictions_of_imagenets_size_give_tables_1_to_3(tmp_path):
    "50,000 ids of 1,000 clusters in a file: no cell of ours is left open in the first three tables."
    import numpy as np
    from selfclass.core import save_arrays
    from selfclass.hierarchy import score_tables
    rng, label = np.random.default_rng(0), np.arange(50_000) % 1000
    pred = np.where(rng.random(50_000) < .4, label, rng.integers(0, 1000, 50_000))
    scores = score_tables(save_arrays(tmp_path/'predictions.npz', pred=pred, label=label))
    for name in ('self-classifier/1', 'self-classifier/2', 'self-classifier/3'):
        found = compare(scores, name, note='synthetic')
        ours, = ours_of(found)
        assert 'not run' not in ours.values() and found.measured == len(found.table.columns)
        assert [cell.number.mean for line in found.lines if line.ours for cell in line.cells] == pytest.approx([100 * scores[metric] for _, metric in found.table.ours.values()])
    assert float(ours_of(compare(scores, 'self-classifier/2'))[0]['10']) > 40 > 0


def test_probes_take_their_columns_and_say_which_protocol_they_are():
    "The published linear protocol comes before its short cut, which has a footnote; conv1-5 stand in SeLa's columns."
    short, crops = ({'linear_top1': .724}, {'linear_top1': .724, 'linear_crops_top1': .741})
    for name, label in (('self-classifier/4', {'epochs': 100}), ('sela/4', {}), ('sela/7', {}), ('kmeans/a1', {}), ('kmeans/1', {})):
        for scores, text, marked in ((short, '72.4', True), (crops, '74.1', False)):
            found = compare(scores, name, **label)
            cell = next(cell for line in found.lines if line.ours for cell in line.cells if cell.number)
            assert round(cell.number.mean, 1) == float(text) and bool(cell.marks) == marked, name
            assert any('random crops' in note for note in found.footnotes) == marked
            assert ('random crops' in comparison_latex(found)) == marked
    layers = {f'conv{i}_top1': .1 * i for i in range(1, 6)}
    assert list(ours_of(compare(layers, 'sela/5'))[0].values()) == ['10.0', '20.0', '30.0', '40.0', '50.0']
    both = ours_of(compare([{'scores': layers, 'dataset': 'imagenet'}, {'scores': {'conv5_top1': .33}, 'dataset': 'places205'}], 'sela/3'))[0]
    assert both['imagenet/c2'] == '20.0' and both['places/c5'] == '33.0' and both['places/c1'] == 'not run'


def test_the_probe_stage_is_read_where_it_ran(tmp_path):
    for stage, scores in (('cluster', {'acc': .9, 'stability_ari': .8}), ('linear', {'linear_top1': .7}),
                          ('probe', {'linear_crops_top1': .75, 'conv1_top1': .2, 'semi_1pct_top1': .5, 'semi_10pct_top1': .6, 'few_shot_5_top1': .4})):
        save_json({'0': scores}, tmp_path/stage/'selfclassifier'/'imagenet.json')
    runs = pipeline_scores(tmp_path, {'imagenet': {}}, {'selfclassifier': {}}, [0])
    assert len(runs[0]['scores']['0']) == 8
    tables = {found.table.name: found for found in comparisons(runs)}
    assert {'self-classifier/1', 'sela/3', 'sela/4', 'sela/5', 'sela/6', 'sela/7', 'kmeans/a1'} <= set(tables)
    assert '75.0' in ours_of(tables['sela/4'])[0].values() and ours_of(tables['sela/5'])[0]['c1'] == '20.0'
    page = comparison_page('all', list(tables.values()), runs)
    for words in ('semi_1pct_top1', 'fine-tuning on 10 % of the labels', 'few_shot_5_top1', 'stability_ari', 'agreement of the clusters with those of the other seeds'):
        assert words in page, words                                   # numbers without a column in any paper are not lost


def test_seeds_become_mean_sd_and_n():
    found = compare({str(seed): RUN | {'acc': .37 + .01 * seed} for seed in range(3)}, 'self-classifier/1')
    line = next(line for line in found.lines if line.ours)
    assert line.labels[0].text.replace('\xa0', ' ') == 'selfclassifier, ours (n = 3)' and line.group == 'own clusters'
    assert line.cells[-1].text == '38.0 ± 1.0' and line.cells[-1].number == Number(38.0, 1.0, 3)
    uneven = compare({'0': {'acc': .3, 'nmi': .5}, '1': {'acc': .4}}, 'self-classifier/1')
    assert ours_of(uneven)[0]['NMI'].replace('\xa0', ' ') == '50.0 (n = 1)'


def test_the_wrong_data_never_fill_a_cell():
    summary = {'digits/selfclassifier/acc': {'mean': .97, 'sd': None, 'n': 1}, 'cifar10/selfclassifier/acc': {'mean': .6, 'sd': None, 'n': 1}}
    for name in published_tables():
        found = compare(summary, name)
        expected = {'scan/1', 'scan/2', 'scan/3'}
        assert bool(found.measured) == (name in expected), name
        other = [line for line in found.lines if line.ours and line.group.startswith('ours on other data')]
        assert all(set(found.table.columns) & {'ACC', 'top1'} for _ in other)
    assert not any('97' in cell for row in ours_of(compare(summary, 'scan/3')) for cell in row.values())


@pytest.mark.parametrize('call, error, says', [
    (lambda: compare({}, 'self-clasifier/1'), ParamsError, "did you mean 'self-classifier/1'"),
    (lambda: published('scan/S1'), ParamsError, "did you mean 'scan/s1'"),
    (lambda: compare({'acc': float('nan')}), DataError, 'finite'),
    (lambda: compare({'acc': 37.2}), DataError, 'divide percentages by 100'),
    (lambda: compare({'acc': '0.4'}), DataError, 'finite number'),
    (lambda: compare({'acc': .5}, backbon='ResNet-50'), ParamsError, "did you mean 'backbone'"),
    (lambda: compare({'acc': .5}, 'scan/3'), ParamsError, "dataset='cifar10'"),
    (lambda: compare({'acc': .5}, 'self-classifier/9'), ParamsError, 'batch_size=')])
def test_bad_input_is_refused_in_one_line(call, error, says):
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value) and '\n' not in str(caught.value)


def test_missing_runs_leave_a_marked_gap(tmp_path):
    save_json({'0': {'acc': .6, 'best_head': 0}}, tmp_path/'cluster'/'selfclassifier'/'cifar10.json')
    runs = pipeline_scores(tmp_path, {'cifar10': {}, 'stl10': {}}, {'selfclassifier': {}, 'kmeans': {}}, [0, 1])
    found = compare(runs, 'scan/3')
    assert [ours['cifar10/ACC'] for ours in ours_of(found)] == ['60.0', 'not run'] and all(ours['stl10/ACC'] == 'not run' for ours in ours_of(found))
    missing = not_run(comparisons(runs))
    assert len(missing) == len(COUNTS) - 3 and any('objectnet (conf/objectnet.yaml)' in needs for needs in missing.values())


@pytest.mark.parametrize('name', published_data())
def test_what_is_not_run_has_a_recipe(name):
    entry = published_data()[name]
    recipe = read_yaml(ROOT/'conf'/f"{entry['recipe']}.yaml")
    assert set(recipe['compare']['tables']) <= set(COUNTS)
    assert entry['folder'] and entry['from']


def test_compare_stage_runs_on_its_default_cell(tmp_path):
    "In an empty repository: every cell of ours is a gap; with a run on the digits, its row is there."
    (tmp_path/'settings.ini').symlink_to(ROOT/'settings.ini')
    source = '\n'.join(source_of(cell) for cell in cells_of(ROOT/'nbs'/'pipeline'/'compare.ipynb') if cell['cell_type'] == 'code')
    ran = python('-W', 'error', '-c', source, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    files = {file.name for file in (tmp_path/'out'/'compare').iterdir()}
    assert files == {'figures', 'index.html', 'methods.csv', 'methods.md', 'summary.json', 'table.csv', 'table.html', 'table.md', 'table.tex'}
    page = (tmp_path/'out'/'compare'/'index.html').read_text()
    assert 'not run' in page and 'No run has been scored yet' in page and '<script' not in page and 'src=' not in page
    save_json({'0': {'acc': .9}}, tmp_path/'out'/'cluster'/'selfclassifier'/'shapes.json')
    assert python('-c', source, cwd=tmp_path).returncode == 0
    assert 'selfclassifier on shapes' in (tmp_path/'out'/'compare'/'table.md').read_text()


def test_make_tables(tmp_path):
    (tmp_path/'settings.ini').symlink_to(ROOT/'settings.ini')
    (tmp_path/'params.yaml').write_text('datasets: {cifar10: {source: cifar10}}\nmethods: {selfclassifier: {}}\nseeds: [0]\n')
    save_json({'0': {'acc': .6, 'nmi': .5, 'ari': .4}}, tmp_path/'out'/'cluster'/'selfclassifier'/'cifar10.json')
    ran = python('-W', 'error', '-m', 'selfclass.report', cwd=tmp_path)
    assert ran.returncode == 0 and 'out/tables/index.html' in ran.stdout, ran.stderr
    stems = ('self-classifier-1', 'scan-1', 'scan-2', 'scan-3')
    assert {file.name for file in (tmp_path/'out'/'tables').iterdir()} == {'index.html'} | {f'{stem}.{end}' for stem in stems for end in ('md', 'tex', 'html', 'csv')}
    assert '60.0' in (tmp_path/'out'/'tables'/'scan-3.md').read_text()
    assert python('-m', 'selfclass.report', '--all', cwd=tmp_path).returncode == 0
    every = {file.name for file in (tmp_path/'out'/'tables').iterdir()}
    assert len(every) == 1 + 4 * len(COUNTS) and 'not run' in (tmp_path/'out'/'tables'/'kmeans-2.md').read_text()
    assert python('-m', 'selfclass.report', '--params', 'nowhere.yaml', cwd=tmp_path).returncode == 2


def test_tables_start_without_torch():
    ran = python('-c', 'import sys, selfclass.published, selfclass.report; selfclass.report.compare(None); print("torch" in sys.modules)')
    assert ran.stdout.strip() == 'False', ran.stderr
