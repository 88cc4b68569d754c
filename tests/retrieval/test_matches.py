import numpy as np

from metilr.retrieval.knn import NO_ROW, top_matches
from metilr.retrieval.search import Neighbours


def by_loop(neighbours: Neighbours, labels: np.ndarray, n: int) -> tuple[list[list[int]], list[list[float]]]:
    all_rows, all_similarities = [], []
    for rows, similarities in zip(neighbours.rows.tolist(), neighbours.similarities.tolist(), strict=True):
        seen: list[int] = []
        found = []
        for row, similarity in zip(rows, similarities, strict=True):
            if labels[row] not in seen and len(found) < n:
                seen.append(int(labels[row]))
                found.append((row, similarity))
        found += [(NO_ROW, float("nan"))] * (n - len(found))
        all_rows.append([row for row, _ in found])
        all_similarities.append([similarity for _, similarity in found])
    return all_rows, all_similarities


def test_one_image_an_exhibit_in_the_order_of_similarity():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 40)
    rows = np.stack([rng.permutation(40)[:9] for _ in range(30)])
    neighbours = Neighbours(-np.sort(-rng.random((30, 9)), axis=1), rows)
    for n in (1, 5, 12):  # 12 exhibits are not there
        matches = top_matches(neighbours, labels, n)
        expected_rows, expected_similarities = by_loop(neighbours, labels, n)
        assert matches.rows.tolist() == expected_rows
        np.testing.assert_array_equal(matches.similarities, expected_similarities)
