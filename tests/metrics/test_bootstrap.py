import numpy as np
import pytest

from metilr.data.ground_truth import load_ground_truth
from metilr.errors import UserError
from metilr.metrics import DISTRACTOR, acc, gap, gap_minus
from metilr.metrics.bootstrap import CHUNK, Interval, bootstrap, intervals, paired_intervals, resampling_units

METRICS = {"gap": gap, "gap_minus": gap_minus, "acc": acc}


def answers(rng, n=40):
    """Few confidences, so many ties, some of them at -inf; met queries and distractors in any order."""
    confidence = rng.choice([-np.inf, -3.0, -2.0, -1.0, -0.5], n)
    target = rng.integers(-1, 3, n)
    target[:4] = 0, 1, 2, DISTRACTOR
    return confidence, np.where(rng.random(n) < 0.6, target, 2), target


def loop(confidence, predicted, target, units, n_resamples, seed):
    """Draw units of met queries and single distractors, write the list down with its copies, measure it."""
    unit_rng, distractor_rng = np.random.default_rng(seed).spawn(2)
    members = {}
    for i in np.flatnonzero(target != DISTRACTOR):
        members.setdefault(("own", -i) if units[i] < 0 else ("unit", units[i]), []).append(i)
    members = [members[key] for key in sorted(members)]
    distractors = np.flatnonzero(target == DISTRACTOR)
    values = {metric: [] for metric in METRICS}
    for _ in range(n_resamples):
        drawn = [i for unit in unit_rng.integers(len(members), size=len(members)) for i in members[unit]]
        if len(distractors):
            drawn += distractors[distractor_rng.integers(len(distractors), size=len(distractors))].tolist()
        drawn = sorted(drawn)
        for metric, function in METRICS.items():
            values[metric].append(function(confidence[drawn], predicted[drawn], target[drawn]))
    return {metric: np.array(value) for metric, value in values.items()}


@pytest.mark.parametrize("with_distractors", [True, False])
@pytest.mark.parametrize("scheme", ["queries", "classes", "photographers"])
def test_equals_a_loop_that_writes_the_copies_down(scheme, with_distractors):
    rng = np.random.default_rng(0)
    confidence, predicted, target = answers(rng)
    if not with_distractors:
        target = np.where(target == DISTRACTOR, 1, target)
    units = resampling_units(target, rng.integers(-1, 4, len(target)))[scheme]
    n = CHUNK + 5  # a full chunk and a part of one
    expected = loop(confidence, predicted, target, units, n, seed=3)
    values = bootstrap(confidence, predicted, target, units, n, seed=3)
    assert values.keys() == expected.keys()
    for metric in METRICS:
        assert values[metric] == pytest.approx(expected[metric], abs=1e-12)
        assert len(np.unique(values[metric])) > 5  # resamples do differ


def test_is_as_exact_with_as_many_queries_as_the_met_test_split_has():
    rng = np.random.default_rng(9)
    target = rng.permutation(np.concatenate([np.arange(1000) % 700, np.full(18_000, DISTRACTOR)]))
    confidence, predicted = rng.standard_normal(19_000), np.where(rng.random(19_000) < 0.6, target, 700)
    expected = loop(confidence, predicted, target, target, 3, seed=0)
    values = bootstrap(confidence, predicted, target, target, 3, seed=0)
    for metric in METRICS:
        assert values[metric] == pytest.approx(expected[metric], abs=1e-10)


def test_what_stands_at_a_distractor_in_units_is_not_read():
    rng = np.random.default_rng(1)
    confidence, predicted, target = answers(rng)
    units = rng.integers(-1, 5, len(target))
    others = np.where(target == DISTRACTOR, 77, units)
    first, second = (bootstrap(confidence, predicted, target, u, 20) for u in (units, others))
    assert all((first[metric] == second[metric]).all() for metric in METRICS)


def test_the_seed_decides_the_draws_and_more_resamples_begin_with_those_of_fewer():
    confidence, predicted, target = answers(np.random.default_rng(2))
    few = bootstrap(confidence, predicted, target, target, 10, seed=5)["gap"]
    many = bootstrap(confidence, predicted, target, target, 2 * CHUNK, seed=5)["gap"]
    assert (many[:10] == few).all()
    assert (bootstrap(confidence, predicted, target, target, 10, seed=6)["gap"] != few).any()


def test_interval_holds_the_level_of_the_resamples():
    confidence, predicted, target = answers(np.random.default_rng(3), n=300)
    units = np.arange(len(target))
    values = bootstrap(confidence, predicted, target, units, 400, seed=1)
    for metric, interval in intervals(confidence, predicted, target, units, 400, seed=1, level=0.8).items():
        assert isinstance(interval, Interval)
        # Many values are equal: the end itself may hold the share that is missing.
        assert np.mean(values[metric] < interval.low) <= 0.1 <= np.mean(values[metric] <= interval.low) + 1 / 400
        assert np.mean(values[metric] > interval.high) <= 0.1 <= np.mean(values[metric] >= interval.high) + 1 / 400
        assert interval.low < METRICS[metric](confidence, predicted, target) < interval.high


def test_a_run_does_not_differ_from_itself():
    confidence, predicted, target = answers(np.random.default_rng(4))
    same = paired_intervals((confidence, predicted), (confidence, predicted), target, target, 30)
    assert same == dict.fromkeys(METRICS, (0.0, 0.0, 0.0))


def test_paired_differences_are_second_minus_first_on_the_same_resamples():
    rng = np.random.default_rng(5)
    confidence, predicted, target = answers(rng, n=80)
    other = confidence[::-1].copy(), np.where(rng.random(80) < 0.3, target, predicted)
    before = loop(confidence, predicted, target, target, 50, seed=8)
    after = loop(*other, target, target, 50, seed=8)
    differences = paired_intervals((confidence, predicted), other, target, target, 50, seed=8, level=0.9)
    for metric, function in METRICS.items():
        low, high = np.percentile(after[metric] - before[metric], [5, 95])
        expected = function(*other, target) - function(confidence, predicted, target), low, high
        assert differences[metric] == pytest.approx(expected, abs=1e-12)
        assert differences[metric].low < differences[metric].high


def photos(rng, n_groups, per_group=8):
    """Met queries in groups that share how hard they are, and 1.5 distractors a met query."""
    group = np.repeat(np.arange(n_groups), per_group)
    ease = 1.5 * rng.standard_normal(n_groups)[group]
    right = rng.random(len(group)) < 1 / (1 + np.exp(-ease))
    n_distractors = len(group) * 3 // 2
    met_confidence = 0.7 * ease + right + rng.standard_normal(len(group))
    confidence = np.concatenate([met_confidence, rng.standard_normal(n_distractors) - 0.5])
    target = np.concatenate([group, np.full(n_distractors, DISTRACTOR)])
    predicted = np.where(np.append(right, np.zeros(n_distractors, bool)), target, n_groups)
    return confidence, predicted, target


def test_intervals_cover_the_truth_if_grouped_photos_are_drawn_together():
    rng = np.random.default_rng(6)
    n_sets, n_groups = 200, 60
    population = photos(rng, 30_000)
    truth = {metric: function(*population) for metric, function in METRICS.items()}
    covered = {scheme: dict.fromkeys(METRICS, 0) for scheme in ("classes", "queries")}
    for i in range(n_sets):
        confidence, predicted, target = photos(rng, n_groups)
        schemes = resampling_units(target, np.full(len(target), -1))
        for scheme, counts in covered.items():
            for metric, (low, high) in intervals(
                confidence, predicted, target, schemes[scheme], n_resamples=200, seed=i
            ).items():
                counts[metric] += low <= truth[metric] <= high
    for metric in METRICS:
        assert 0.88 <= covered["classes"][metric] / n_sets <= 0.995
        assert covered["queries"][metric] / n_sets < 0.85


def test_schemes_of_the_published_test_split(met_root):
    truth = load_ground_truth(met_root, "mini")
    labels, photographers = truth.labels["test"], truth.photographers["test"]
    schemes = resampling_units(labels, photographers)
    met = labels != DISTRACTOR
    assert {scheme: len(np.unique(units[met])) for scheme, units in schemes.items()} == {
        "queries": 1003, "classes": 734, "photographers": 25,
    }  # fmt: skip
    assert sorted(np.unique(photographers[met], return_counts=True)[1])[-2:] == [325, 492]  # four fifths


@pytest.mark.parametrize(
    ("labels", "photographers", "schemes"),
    [
        ([0, 0, 1, -1], [0, 1, 1, -1], ["queries", "classes", "photographers"]),
        ([0, 0, 1, -1], [0, 0, -1, 1], ["queries", "classes"]),  # the second photographer took a distractor
        ([2, 2, -1, -1], [0, 1, -1, -1], ["queries", "photographers"]),
        ([0, -1, -1, -1], [0, 1, 2, 3], []),
    ],
)
def test_a_scheme_that_cannot_vary_is_left_out(labels, photographers, schemes):
    assert list(resampling_units(np.array(labels), np.array(photographers))) == schemes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_resamples": 0}, "n_resamples 0: choose at least 1"),
        ({"level": 1.0}, "level 1.0: choose a share between 0 and 1"),
        ({"level": float("nan")}, "level nan"),
        ({"units": [4, 4, 4, 9]}, "all met queries are one unit"),
        ({"log_confidence": [0.0, np.nan, 0.0, 0.0]}, "query 1 is NaN"),
        ({"target": [-1, -1, -1, -1]}, "no query shows an exhibit"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "log_confidence": [0.0, -1.0, -2.0, -3.0], "predicted": [1, 2, 3, 4], "target": [1, 2, 2, -1],
        "units": [0, 1, 1, 0],
    }  # fmt: skip
    intervals(**arguments, n_resamples=2)
    with pytest.raises(UserError, match=message):
        intervals(**arguments | change)


@pytest.mark.parametrize("level", [0.0, 95])
def test_paired_refuses_a_level_out_of_range(level):
    run = ([0.0, -1.0], [1, 2])
    with pytest.raises(UserError, match=f"level {level}"):
        paired_intervals(run, run, [1, 2], [0, 1], level=level)


@pytest.mark.parametrize("units", [[0, 1], [0.0, 1.0, 2.0], [[0, 1, 2]]])
def test_units_must_be_integers_one_a_query(units):
    with pytest.raises(ValueError, match="units must be 3 integers"):
        bootstrap([0, -1, -2], [1, 2, 3], [1, 2, 3], units)
