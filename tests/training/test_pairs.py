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
    return unit(np.random.default_rng(0).normal(size=(len(LABELS), 8)))


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def usual_negatives(descriptors, labels, anchor, n=10) -> set[int]:
    similarities = descriptors.astype(np.float64) @ descriptors[anchor].astype(np.float64)
    others = [j for j in range(len(labels)) if labels[j] != labels[anchor]]
    return set(sorted(others, key=lambda j: (-similarities[j], j))[:n])


def drawn_by(draw, n: int) -> dict[int, set[int]]:
    """All that ``draw`` gives each anchor, over ``n`` seeds."""
    every = np.array([draw(np.random.default_rng(seed)) for seed in range(n)])
    return {anchor: set(every[:, anchor].tolist()) for anchor in ROWS.tolist()}


def test_negatives_are_drawn_from_the_ten_most_similar_of_other_classes(descriptors):
    drawn = drawn_by(lambda rng: hard_negatives(ROWS, ROWS, LABELS, descriptors, rng), 300)
    assert drawn == {anchor: usual_negatives(descriptors, LABELS, anchor) for anchor in ROWS.tolist()}


def test_a_class_of_more_images_than_the_first_search_sees(descriptors):
    """Near-copies of one exhibit fill the neighbourhood: the search goes on until it finds others."""
    copies = np.repeat(descriptors[:1], 60, axis=0) + np.random.default_rng(1).normal(size=(60, 8)) * 1e-3
    many = np.concatenate([unit(copies), descriptors[3:]])
    labels = np.concatenate([np.zeros(60, dtype=np.int64), LABELS[3:]])
    for seed in range(20):
        chosen = hard_negatives(np.array([0, 61]), np.arange(len(many)), labels, many, np.random.default_rng(seed))
        assert all(negative in usual_negatives(many, labels, i) for i, negative in zip((0, 61), chosen, strict=True))


def test_fewer_than_ten_negatives_and_one_class(descriptors):
    def chosen(labels: list[int], seed: int) -> int:
        rng = np.random.default_rng(seed)
        return int(hard_negatives(np.array([0]), np.arange(4), np.array(labels), descriptors[:4], rng)[0])

    assert {chosen([0, 0, 1, 2], seed) for seed in range(30)} == {2, 3}
    with pytest.raises(UserError, match="two exhibits"):
        chosen([0, 0, 0, 0], 0)


@pytest.mark.parametrize("pairing", ["syn", "syn+real+neg", "syn+real-closest+neg"])
def test_positives(descriptors, pairing):
    drawn = drawn_by(lambda rng: positives(ROWS, ROWS, LABELS, pairing, descriptors, rng), 200)
    for anchor in ROWS.tolist():
        fellows = [j for j in ROWS.tolist() if LABELS[j] == LABELS[anchor] and j != anchor]
        if pairing == "syn" or not fellows:
            assert drawn[anchor] == {anchor}
        elif pairing == "syn+real+neg":
            assert drawn[anchor] == set(fellows)
        else:
            assert drawn[anchor] == {anchor, max(fellows, key=lambda j: float(descriptors[anchor] @ descriptors[j]))}


def test_an_epoch_has_each_image_left_in_as_anchor_of_one_positive_and_one_negative(descriptors):
    rows = np.setdiff1d(ROWS, [1, 4, 13])
    pairs = draw_pairs(rows, LABELS, descriptors, PairOptions(pairing="syn+real+neg"), 0, 0)
    assert sorted(pairs.first[pairs.positive]) == sorted(pairs.first[~pairs.positive]) == rows.tolist()
    assert set(pairs.second) <= set(rows)
    assert (LABELS[pairs.first] == LABELS[pairs.second]).tolist() == pairs.positive.tolist()
    assert len({*pairs.first_view.tolist(), *pairs.second_view.tolist()}) == 2 * len(pairs)


def test_epochs_and_seeds_differ_and_repeat(descriptors):
    def drawn(epoch: int, seed: int) -> list:
        return draw_pairs(ROWS, LABELS, descriptors, PairOptions(pairing="syn+neg"), epoch, seed).tolist()

    assert drawn(0, 0) == drawn(0, 0) and drawn(0, 0) != drawn(1, 0) and drawn(0, 0) != drawn(0, 1)


@pytest.mark.parametrize("n_views", [1, 3])
def test_a_fixed_number_of_views(n_views):
    pairs = draw_pairs(ROWS, LABELS, None, PairOptions(anchors_per_epoch=500, n_views=n_views), 0, 0)
    assert set(pairs.first_view) == set(pairs.second_view) == set(range(n_views))
    assert n_views == 1 or (pairs.first_view != pairs.second_view).all()


def test_anchors_come_round_evenly():
    counts = np.bincount(choose_anchors(ROWS, 50, np.random.default_rng(0)), minlength=len(ROWS))
    assert counts.sum() == 50 and set(counts) == {2, 3}
    assert len(set(choose_anchors(ROWS, 7, np.random.default_rng(0)))) == 7


def test_balanced_anchors_have_each_exhibit_as_often_and_its_images_in_turn():
    rows, labels = np.array([2, 3, 5, 7, 8, 9, 10, 11]), np.array([9, 9, 0, 4, 9, 4, 9, 4, 4, 9, 9, 7])
    options = PairOptions(anchors_per_epoch=14, balance=True)
    epochs = [draw_pairs(rows, labels, None, options, epoch, 0).first for epoch in range(30)]
    for anchors in epochs:
        times = np.bincount(labels[anchors], minlength=10)
        assert set(times[[0, 4, 7, 9]]) == {3, 4} and times.sum() == 14
        for label in (4, 9):
            images = np.bincount(anchors, minlength=12)[rows[labels[rows] == label]]
            assert images.max() - images.min() <= 1
    assert {row for anchors in epochs for row in anchors.tolist()} == {*rows.tolist()}
    once = draw_pairs(rows, labels, None, PairOptions(balance=True), 0, 0).first
    assert sorted(labels[once]) == [0, 4, 7, 9]
    assert len({tuple(sorted(anchors)) for anchors in epochs}) > 1  # other images in other epochs


@pytest.mark.parametrize(("n", "size", "world"), [(20, 8, 1), (20, 8, 3), (7, 64, 2), (64, 64, 5), (129, 64, 8)])
def test_each_pair_once_over_all_processes(n, size, world):
    parts = [deal_batches(n, size, rank, world) for rank in range(world)]
    whole = [np.concatenate(batches).tolist() for batches in zip(*parts, strict=True)]
    assert whole == [batch.tolist() for batch in deal_batches(n, size, 0, 1)]
    assert [i for batch in whole for i in batch] == list(range(n)) and max(map(len, whole)) <= size
    for batches in zip(*parts, strict=True):
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_more_processes_than_pairs():
    with pytest.raises(UserError, match="fewer processes"):
        deal_batches(5, 2, 0, 3)
