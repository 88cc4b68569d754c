import numpy as np
import pytest

from metilr.extraction.datamodule import deal, same_shape_batches


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_every_position_once_in_batches_of_one_shape_largest_area_first(batch_size):
    rng = np.random.default_rng(batch_size)
    shapes = rng.choice([20, 30, 40, 60], (200, 2))
    batches = same_shape_batches(shapes, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({tuple(shape) for shape in shapes[batch].tolist()}) == 1
        assert batch.tolist() == sorted(batch.tolist())
    areas = [int(shapes[batch[0]].prod()) for batch in batches]
    assert areas == sorted(areas, reverse=True)
    kinds = {tuple(shape) for shape in shapes.tolist()}
    assert len(batches) == sum(
        -(-sum(tuple(shape) == kind for shape in shapes.tolist()) // batch_size) for kind in kinds
    )


def test_transposed_shapes_do_not_mix():
    assert [b.tolist() for b in same_shape_batches(np.array([[2, 3], [3, 2], [2, 3]]), 8)] == [[0, 2], [1]]


def test_nothing_gives_no_batches():
    assert same_shape_batches(np.zeros((0, 2), dtype=np.int64), 4) == []


def test_photographs_of_millions_of_pixels_come_in_smaller_batches():
    shapes = np.array([[500, 500]] * 8 + [[1000, 500]] * 8 + [[3000, 4000]] * 2)
    sizes = {tuple(shapes[batch[0]]): len(batch) for batch in same_shape_batches(shapes, batch_size=8)}
    assert sizes == {(500, 500): 8, (1000, 500): 4, (3000, 4000): 1}


@pytest.mark.parametrize("n_processes", [1, 3, 8, 50])
def test_each_batch_is_dealt_once_and_work_is_even(n_processes):
    work = np.random.default_rng(0).integers(1, 100, 40).tolist()
    shares = deal(work, n_processes)
    assert len(shares) == n_processes
    assert sorted(batch for share in shares for batch in share) == list(range(40))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(work[batch] for batch in share) for share in shares]
    # Whoever has most got its last batch when it had least.
    smallest = [min((work[batch] for batch in share), default=0) for share in shares]
    busiest = int(np.argmax(loads))
    assert loads[busiest] - smallest[busiest] <= min(loads)


def test_nothing_is_dealt_to_all():
    assert deal([], 2) == [[], []]
