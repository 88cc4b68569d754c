"""Pairs against brute force: loops over all images, written from the definition."""

import numpy as np
import pytest

from metilr.errors import UserError
from metilr.training import PairOptions
from metilr.training.pairs import choose_anchors, deal_batches, draw_pairs, hard_negatives, positives

LABELS = np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 10, 11, 12, 13])
ROWS = np.arange(len(LABELS))


@pytest.fixture
def descriptors() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(len(LABELS), 8)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def usual_negatives(descriptors, labels, anchor, n=10) -> set[int]:
    others = [j for j in range(len(labels)) if labels[j] != labels[anchor]]
    others.sort(key=lambda j: (-float(descriptors[anchor].astype(np.float64) @ descriptors[j].astype(np.float64)), j))
    return set(others[:n])


def test_negatives_are_drawn_from_the_ten_most_similar_of_other_classes(descriptors):
    drawn = {anchor: set() for anchor in ROWS.tolist()}
    for seed in range(300):
        for anchor, negative in enumerate(hard_negatives(ROWS, ROWS, LABELS, descriptors, np.random.default_rng(seed))):
            drawn[anchor].add(int(negative))
    assert drawn == {anchor: usual_negatives(descriptors, LABELS, anchor) for anchor in ROWS.tolist()}


def test_a_class_of_more_images_than_the_first_search_sees(descriptors):
    """Near-copies of one exhibit fill the neighbourhood: the search goes on until it finds others."""
    rng = np.random.default_rng(1)
    copies = np.repeat(descriptors[:1], 60, axis=0) + rng.normal(size=(60, 8)).astype(np.float32) * 1e-3
    many = np.concatenate([copies / np.linalg.norm(copies, axis=1, keepdims=True), descriptors[3:]])
    labels = np.concatenate([np.zeros(60, dtype=np.int64), LABELS[3:]])
    for seed in range(20):
        chosen = hard_negatives(np.array([0, 61]), np.arange(len(many)), labels, many, np.random.default_rng(seed))
        assert chosen[0] in usual_negatives(many, labels, 0)
        assert chosen[1] in usual_negatives(many, labels, 61)


def test_fewer_than_ten_negatives_and_one_class(descriptors):
    labels = np.array([0, 0, 1, 2])
    chosen = {
        int(hard_negatives(np.array([0]), np.arange(4), labels, descriptors[:4], np.random.default_rng(s))[0])
        for s in range(30)
    }
    assert chosen == {2, 3}
    with pytest.raises(UserError, match="two exhibits"):
        hard_negatives(np.array([0]), np.arange(4), np.zeros(4, int), descriptors[:4], np.random.default_rng(0))


def test_rows_left_out_are_never_drawn(descriptors):
    rows = np.setdiff1d(ROWS, [1, 4, 13])
    for seed in range(30):
        pairs = draw_pairs(rows, LABELS, descriptors, PairOptions(pairing="syn+real+neg"), 0, seed)
        assert set(pairs.first) == set(rows) and set(pairs.second) <= set(rows)


@pytest.mark.parametrize("pairing", ["syn", "syn+real+neg", "syn+real-closest+neg"])
def test_positives(descriptors, pairing):
    drawn = {anchor: set() for anchor in ROWS.tolist()}
    for seed in range(200):
        for anchor, positive in enumerate(
            positives(ROWS, ROWS, LABELS, pairing, descriptors, np.random.default_rng(seed))
        ):
            drawn[anchor].add(int(positive))
    for anchor in ROWS.tolist():
        fellows = [j for j in ROWS.tolist() if LABELS[j] == LABELS[anchor] and j != anchor]
        if pairing == "syn" or not fellows:
            expected = {anchor}
        elif pairing == "syn+real+neg":
            expected = set(fellows)
        else:
            expected = {anchor, max(fellows, key=lambda j: float(descriptors[anchor] @ descriptors[j]))}
        assert drawn[anchor] == expected


def test_an_epoch_has_each_image_as_anchor_of_one_positive_and_one_negative(descriptors):
    pairs = draw_pairs(ROWS, LABELS, descriptors, PairOptions(pairing="syn+neg"), 0, 0)
    assert sorted(pairs.first[pairs.positive]) == sorted(pairs.first[~pairs.positive]) == ROWS.tolist()
    assert (LABELS[pairs.first] == LABELS[pairs.second]).tolist() == pairs.positive.tolist()
    views = np.concatenate([pairs.first_view, pairs.second_view])
    assert len(set(views.tolist())) == 2 * len(pairs)


def test_epochs_and_seeds_differ_and_repeat(descriptors):
    def drawn(epoch, seed):
        pairs = draw_pairs(ROWS, LABELS, descriptors, PairOptions(pairing="syn+neg"), epoch, seed)
        return np.stack([pairs.first, pairs.second]).tolist()

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0) and drawn(0, 0) != drawn(0, 1)


def test_a_fixed_number_of_views(descriptors):
    pairs = draw_pairs(ROWS, LABELS, None, PairOptions(anchors_per_epoch=500, n_views=3), 0, 0)
    assert set(pairs.first_view) == set(pairs.second_view) == {0, 1, 2}
    assert (pairs.first_view != pairs.second_view).all()
    single = draw_pairs(ROWS, LABELS, None, PairOptions(anchors_per_epoch=500, n_views=1), 0, 0)
    assert set(single.first_view) == set(single.second_view) == {0}


def test_anchors_come_round_evenly():
    counts = np.bincount(choose_anchors(ROWS, 50, np.random.default_rng(0)), minlength=len(ROWS))
    assert counts.sum() == 50 and set(counts) == {2, 3}
    assert len(set(choose_anchors(ROWS, 7, np.random.default_rng(0)))) == 7


@pytest.mark.parametrize(("n", "size", "world"), [(20, 8, 1), (20, 8, 3), (7, 64, 2), (64, 64, 5), (129, 64, 8)])
def test_each_pair_once_over_all_processes(n, size, world):
    parts = [deal_batches(n, size, rank, world) for rank in range(world)]
    assert sorted(i for part in parts for batch in part for i in batch.tolist()) == list(range(n))
    assert len({len(part) for part in parts}) == 1
    for batches in zip(*parts, strict=True):
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1 and sum(sizes) <= size
    whole = deal_batches(n, size, 0, 1)
    for i, batch in enumerate(whole):
        assert np.concatenate([part[i] for part in parts]).tolist() == batch.tolist()


def test_more_processes_than_pairs():
    with pytest.raises(UserError, match="fewer processes"):
        deal_batches(5, 2, 0, 3)
