"""What a person decided in the explorer, as a result that everything else reads."""
import csv
import shlex

import numpy as np
import pytest

from selfclass.curation import (HAND, REFINED, Curation, curate, curated_result, export_labels, export_names, load_session, propose_refine, propose_split, save_session)
from selfclass.errors import ParamsError
from selfclass.result import ClusterResult, load_result, read_names, rename_clusters


def blobs(n=60, k=6, seed=0, **parts) -> ClusterResult:
    "n images around k directions; the model is right about most and sure of few."
    gen = np.random.default_rng(seed)
    home = np.arange(n) % k
    features = np.eye(k, 8)[home] + gen.normal(0, .15, (n, 8))
    logits = 4 * features[:, :k] + gen.normal(0, .6, (n, k))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return ClusterResult(**(dict(probs=probs, features=features, xy=features[:, :2], pixels=gen.integers(0, 256, (n, 3, 8, 8)), labels=home,
                                 class_names=[f'class {c}' for c in range(k)], facts={'seed': seed}) | parts))


def an_afternoon(result) -> Curation:
    "Every kind of edit, some on top of others."
    curation = curate(result).do('rename', cluster=0, name='zebra').do('merge', clusters=[1, 2], into=2).do('rename', cluster=3, name='cluster 1')
    curation = curation.do(**propose_split(curation, 2)).do('merge', clusters=[4, 6], into=6).do('move', images=[0, 7], cluster=5).do('gather', images=[11, 12], name='odd')
    return curation.do(**propose_refine(curation)).do('move', images=[1, 2], cluster=3).do('merge', clusters=[0, 3], into=0).do('reject', images=[3, 11])


def agrees(result, curation):
    "That a result says what the state of a curation says."
    state = curation.state
    alive = np.array([*state.alive, -1])
    assert np.array_equal(alive[result.cluster], state.cluster)
    assert result.names == [state.names[c] for c in state.alive]
    assert np.array_equal(result.sizes, state.sizes[state.alive])
    np.testing.assert_allclose(result.confidence, state.confidence, atol=1e-6)


def test_a_curated_result_says_what_the_person_decided(tmp_path):
    result = blobs()
    curation = an_afternoon(result)
    curated = curated_result(curation)
    agrees(curated, curation)
    spoken = curation.state.source != REFINED                  # after a merge nobody knows what the probe would have said of the two as one
    np.testing.assert_allclose(curated.margin[spoken], curation.state.margin[spoken], atol=1e-6)
    assert curated.names == ['zebra', 'cluster 2', 'cluster 5', 'cluster 2 (2)', 'odd']
    assert curated.facts == {'seed': 0, 'edits': 11, 'model clusters': [0, 1, 1, 0, 3, 2]} and np.array_equal(curated.pixels, result.pixels) and np.array_equal(curated.labels, result.labels)
    assert np.allclose(curated.probs.sum(1), 1, atol=1e-5) and (curated.probs >= 0).all()
    hand = curation.state.source == HAND
    assert hand.sum() == 7 and (curated.probs[hand & (curated.cluster >= 0)].max(1) == 1).all()
    assert np.flatnonzero(curated.cluster < 0).tolist() == [3, 11] and curated.confidence[[3, 11]].tolist() == curated.margin[[3, 11]].tolist() == [0, 0]


def test_a_curated_result_is_saved_and_opened_like_any_other(tmp_path):
    curation = an_afternoon(blobs())
    opened = load_result(curated_result(curation).save(tmp_path/'curated'))
    agrees(opened, curation)
    assert np.array_equal(curate(opened).state.confidence, opened.confidence)
    assert curate(opened).state.source[[3, 11]].tolist() == [HAND, HAND] and (curate(opened).state.cluster[[3, 11]] == -1).all()
    again = curate(opened).do('merge', clusters=[0, 1], into=0).do('rename', cluster=0, name='both')
    assert curated_result(again).names == ['both', 'cluster 5', 'cluster 2 (2)', 'odd']


def test_a_session_file_leads_to_the_same_result(tmp_path):
    result = blobs()
    curation = an_afternoon(result)
    save_session(curation, tmp_path/'session.json')
    again = curated_result(load_session(load_result(result.save(tmp_path/'result')), tmp_path/'session.json'))
    assert np.array_equal(again.probs, curated_result(curation).probs) and again.names == curated_result(curation).names


def test_no_edit_no_change():
    result = blobs()
    same = curated_result(curate(result))
    assert np.array_equal(same.probs, result.probs) and same.names == result.names and np.array_equal(same.margin, result.margin)


@pytest.mark.parametrize('seed', range(4))
def test_refined_images_keep_confidence_and_lead(seed):
    curation = curate(blobs(seed=seed)).do('move', images=[0, 1], cluster=2)
    curation = curation.do(**propose_refine(curation))
    curated = curated_result(curation)
    np.testing.assert_allclose(curated.confidence, curation.state.confidence, atol=1e-6)
    np.testing.assert_allclose(curated.margin, curation.state.margin, atol=2e-4)            # the edit holds four digits


def test_rivals_that_become_one_are_a_stronger_rival():
    result = ClusterResult(np.array([[.4, .35, .25]]), xy=np.zeros((1, 2)))
    state = curate(result).do('merge', clusters=[1, 2], into=1).state
    np.testing.assert_allclose([state.confidence[0], state.margin[0]], [.4, -.2], atol=1e-6)


def test_all_merged_into_one_is_certain():
    curation = curate(blobs()).do('move', images=[0], cluster=2)
    curation = curation.do(**propose_refine(curation)).do('merge', clusters=list(range(6)), into=3)
    curated = curated_result(curation)
    assert curated.probs.shape == (60, 1) and (curated.confidence == 1).all() and curated.sizes.tolist() == [60]


def test_a_part_split_off_and_merged_elsewhere_takes_its_share_along():
    result = blobs()
    curation = curate(result)
    curation = curation.do(**propose_split(curation, 0)).do('merge', clusters=[1, 6], into=1)
    part = np.flatnonzero((result.cluster == 0) & (curation.state.cluster == 1))
    assert len(part)
    np.testing.assert_allclose(curated_result(curation).confidence[part], result.probs[part][:, [0, 1]].sum(1), atol=1e-6)
    agrees(curated_result(curation), curation)


def test_the_exported_files_use_the_numbers_of_the_curated_result(tmp_path):
    "Also where a name of a cluster that was merged away is in use again."
    curation = an_afternoon(blobs())
    curated = curated_result(curation)
    names = read_names(export_names(curation, tmp_path/'names.yaml'))
    assert names == dict(enumerate(curated.names))
    assert rename_clusters(curated, names | {1: 'five'}).names[1] == 'five'
    with export_labels(curation, tmp_path/'labels.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [int(row['cluster']) for row in rows] == curated.cluster.tolist()
    assert [row['name'] for row in rows] == [curated.names[c] if c >= 0 else '' for c in curated.cluster]


def test_a_cluster_keeps_no_name_of_a_living_one():
    reused = curate(blobs()).do('merge', clusters=[1, 2], into=2).do('rename', cluster=3, name='cluster 1')
    assert curated_result(reused).names == ['cluster 0', 'cluster 2', 'cluster 1', 'cluster 4', 'cluster 5']


def test_the_line_that_the_explorer_says_takes_the_edits_to_the_command_line(tmp_path, capsys):
    "And a person who comes back goes on with the edits, though they are in the result by now."
    from selfclass.cli import main
    from selfclass.explorer import explore
    blobs().save(tmp_path/'my result')
    shown = explore(tmp_path/'my result')
    for message in ({'do': 'rename', 'cluster': 0, 'name': 'zebra'}, {'do': 'tick', 'cluster': 1, 'on': True}, {'do': 'tick', 'cluster': 2, 'on': True}, {'do': 'merge'},
                    {'do': 'pick', 'images': [3], 'on': True}, {'do': 'reject'}, {'do': 'export'}):
        shown.receive(message)
    command = shlex.split(shown.status.partition('on the command line: ')[2])
    assert command[:2] == ['selfclass', 'export'] and not main(command[1:])
    edited = load_result(tmp_path/'my result')
    assert edited.names == curated_result(shown.curation).names and np.array_equal(edited.cluster, curated_result(shown.curation).cluster) and edited.cluster[3] == -1
    again = explore(tmp_path/'my result')
    assert 'going on with the session of 3 edits' in again.status and again.curation.edits == shown.curation.edits and len(again.curation.undo().edits) == 2
    again.receive({'do': 'undo'})
    again.receive({'do': 'export'})
    assert not main(command[1:]) and load_result(tmp_path/'my result').cluster[3] != -1


def test_the_report_counts_what_is_in_no_cluster_and_shows_the_others():
    from selfclass.gallery import cluster_page
    page = cluster_page(curated_result(an_afternoon(blobs())))
    assert '<b>2</b>in no cluster, marked as wrong' in page and 'picture 4"' in page and 'picture 3"' not in page and 'picture 11"' not in page


def test_a_keyword_that_chooses_nothing_is_refused(tmp_path):
    from selfclass.explorer import explore
    with pytest.raises(ParamsError, match="did you mean 'method'"):
        explore(tmp_path, metod='scan')
    with pytest.raises(ParamsError, match='seed choose a run'):
        explore(blobs(), seed=1)
