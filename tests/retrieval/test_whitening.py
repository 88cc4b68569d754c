import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from sklearn.decomposition import PCA

from metilr.errors import UserError
from metilr.retrieval import whitening as whitening_module
from metilr.retrieval.whitening import (
    DEFAULT_DIM,
    LearnedWhitening,
    PCAWhitening,
    fit_learned_whitening,
    fit_pca_whitening,
)

FOLDER = Path(__file__).parent


def descriptors(n=400, width=24, seed=0):
    """Correlated, off-centre, unit length: like the real ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + 3
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("shrinkage", [0.0, 1.0])
def test_equals_scikit_learn_up_to_sign_and_denominator(shrinkage):
    x = descriptors()
    whitening = fit_pca_whitening([x], dim=10, shrinkage=shrinkage)
    pca = PCA(n_components=10, whiten=shrinkage == 1, svd_solver="full").fit(x.astype(np.float64))
    expected = pca.transform(x.astype(np.float64))
    if shrinkage == 1:
        expected *= np.sqrt(len(x) / (len(x) - 1))  # scikit-learn divides the covariance by n - 1
    projected = (x - whitening.mean) @ whitening.projection
    projected *= np.sign((projected * expected).sum(axis=0))
    np.testing.assert_allclose(projected, expected, atol=1e-9)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(whitening.eigenvalues[:10] * len(x) / (len(x) - 1), pca.explained_variance_, rtol=1e-9)


def test_shrinkage_between_whitens_part_of_the_way():
    x = descriptors()
    half = fit_pca_whitening([x], shrinkage=0.5)
    projected = (x - half.mean) @ half.projection
    np.testing.assert_allclose(projected.var(axis=0), np.sqrt(half.eigenvalues), rtol=1e-8)


def test_transform_is_the_formula_to_float32_rounding(monkeypatch):
    x = descriptors()
    whitening = fit_pca_whitening([x], dim=12)
    expected = np.array([(row.astype(np.float64) - whitening.mean) @ whitening.projection for row in x])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    whitened = whitening.transform(x)
    assert whitened.dtype == np.float32 and whitened.shape == (400, 12)
    np.testing.assert_allclose(whitened, expected, rtol=2**-23, atol=1e-12)
    monkeypatch.setattr(whitening_module, "_BLOCK_ROWS", 7)
    np.testing.assert_allclose(whitening.transform(x), whitened, rtol=2**-22, atol=1e-12)


def test_a_descriptor_at_the_mean_stays_zero():
    whitening = fit_pca_whitening([np.array([[1, 0], [-1, 0], [0, 2], [0, -2]], dtype=np.float32)])
    np.testing.assert_array_equal(whitening.transform(np.zeros((1, 2), dtype=np.float32)), [[0, 0]])


def test_cutting_into_chunks_changes_rounding_only():
    # Sorted rows: the first chunk's mean, from which sums are taken, is far from the mean of all.
    x = descriptors()[np.argsort(descriptors()[:, 0])]
    whole = fit_pca_whitening([x])
    for size in (1, 7, 399):
        cut = fit_pca_whitening(x[i : i + size] for i in range(0, len(x), size))
        assert cut.n == 400
        np.testing.assert_allclose(cut.mean, whole.mean, atol=1e-14)
        np.testing.assert_allclose(cut.eigenvalues, whole.eigenvalues, rtol=1e-9)
        np.testing.assert_allclose(cut.projection, whole.projection, rtol=1e-6, atol=1e-8)


def test_a_large_offset_does_not_cancel():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, 4)) + 4096).astype(np.float32)
    exact = np.cov((x - 4096).astype(np.float64).T, bias=True)
    np.testing.assert_allclose(fit_pca_whitening([x]).eigenvalues, np.sort(np.linalg.eigvalsh(exact))[::-1], rtol=1e-12)


def test_memory_does_not_grow_with_the_chunk(tmp_path):
    np.save(tmp_path / "x.npy", np.tile(descriptors(4096, 16), (50, 1)))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    tracemalloc.start()
    fit_pca_whitening([x])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes  # float64 copies of all of it would be twice that


def test_fewer_descriptors_than_dimensions():
    x = descriptors(n=10)
    whitening = fit_pca_whitening([x])
    assert whitening.dim == whitening.supported_dim == 9 < DEFAULT_DIM
    assert np.isfinite(whitening.transform(x)).all()
    assert fit_pca_whitening([x], dim=9).dim == 9
    assert fit_pca_whitening([np.tile(descriptors(n=5), (100, 1))]).supported_dim == 4
    with pytest.raises(UserError, match=r"dim 10: .* support 1 to 9"):
        fit_pca_whitening([x], dim=10)


def test_wide_data_keeps_the_default_dim():
    rng = np.random.default_rng(0)
    whitening = fit_pca_whitening([rng.standard_normal((600, 520), dtype=np.float32)])
    assert (whitening.dim, whitening.supported_dim) == (DEFAULT_DIM, 520)
    assert whitening.projection.dtype == np.float64


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_duplicated_and_constant_columns_do_not_count(scale):
    x = descriptors() * np.float32(scale)
    x = np.concatenate([x, x[:, :5], np.full((400, 1), 0.3, dtype=np.float32)], axis=1)
    whitening = fit_pca_whitening([x])
    assert whitening.dim == whitening.supported_dim == 24
    projected = (x - whitening.mean) @ whitening.projection
    np.testing.assert_allclose(projected.T @ projected / len(x), np.eye(24), atol=1e-6)


def test_signs_are_fixed():
    whitening = fit_pca_whitening([descriptors()])
    largest = np.abs(whitening.projection).argmax(axis=0)
    assert (whitening.projection[largest, np.arange(24)] > 0).all()
    # Columns that mirror each other up to rounding: which component is larger is chance, the first decides.
    for slightly_more in (1 - 2**-23, 1, 1 + 2**-23):
        mirrored = fit_pca_whitening([np.array([[1, -slightly_more], [-1, slightly_more]], dtype=np.float32)])
        assert mirrored.projection[0, 0] > 0 > mirrored.projection[1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad):
    x = descriptors()
    whitening = fit_pca_whitening([x])
    x[270, 3] = bad
    with pytest.raises(UserError, match="descriptor 270 "):
        fit_pca_whitening([x[:200], x[200:]])
    with pytest.raises(UserError, match="descriptor 270 "):
        whitening.transform(x)
    with pytest.raises(UserError, match="width 24"):
        whitening.transform(x[:, 1:])


@pytest.mark.parametrize(
    ("chunks", "options", "message"),
    [
        ([], {}, "at least 2"),
        ([descriptors(1)], {}, "at least 2"),
        ([descriptors(5), descriptors(5, width=23)], {}, "one model"),
        ([descriptors(5)[0]], {}, "one model"),
        ([np.ones((5, 3), dtype=np.float32)], {}, "the same"),
        ([descriptors(5)], {"shrinkage": 1.5}, "shrinkage"),
        ([descriptors(5)], {"shrinkage": np.nan}, "shrinkage"),
        ([descriptors(5)], {"dim": 0}, "dim 0"),
    ],
)
def test_refuses_what_cannot_be_whitened(chunks, options, message):
    with pytest.raises(UserError, match=message):
        fit_pca_whitening(chunks, **options)


def test_saved_and_loaded_is_the_same(tmp_path):
    whitening = fit_pca_whitening([descriptors()], dim=8, shrinkage=0.5)
    path = tmp_path / "new folder" / "whitening"  # no suffix: np.savez would have added one
    whitening.save(path)
    loaded = PCAWhitening.load(path)
    for name in ("mean", "projection", "eigenvalues"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(whitening, name))
    assert (loaded.dim, loaded.shrinkage, loaded.n, loaded.supported_dim) == (8, 0.5, 400, 24)
    assert [file.name for file in path.parent.iterdir()] == ["whitening"]


def test_whitenings_of_the_first_edition_are_read():
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    pca, learned = (PCAWhitening.load(FOLDER / f"first_edition_{kind}.npz") for kind in ("pca", "learned"))
    assert (pca.dim, pca.shrinkage, pca.n) == (3, 0.5, 20) and not isinstance(pca, LearnedWhitening)
    np.testing.assert_allclose(pca.transform(x), fit_pca_whitening([x], 3, 0.5).transform(x), rtol=1e-5, atol=1e-6)
    again = fit_learned_whitening([x], [x[:9] - x[9:18]], 2)
    assert isinstance(learned, LearnedWhitening) and learned.n_pairs == 9
    np.testing.assert_allclose(learned.transform(x), again.transform(x), rtol=1e-5, atol=1e-6)


def test_loading_another_file_names_it(tmp_path):
    good = tmp_path / "good.npz"
    fit_pca_whitening([descriptors()]).save(good)
    arrays, content = dict(np.load(good)), good.read_bytes()
    (tmp_path / "truncated.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "lone.npy", np.zeros(3))
    np.savez(tmp_path / "pickled.npz", **{**arrays, "mean": np.array([{}], dtype=object)})
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    np.savez(tmp_path / "later.npz", **{**arrays, "format": np.array("metilr.PCAWhitening/2")})
    np.savez(tmp_path / "misfit.npz", **{**arrays, "mean": np.zeros(3)})
    np.savez(tmp_path / "nan.npz", **{**arrays, "mean": np.full(24, np.nan)})
    others = [path for path in tmp_path.iterdir() if path != good]
    assert len(others) == 8
    for path in [*others, tmp_path / "missing.npz", tmp_path]:
        with pytest.raises(UserError, match=path.name):
            PCAWhitening.load(path)


def pairs(n=500, width=24, seed=1):
    """Differences of pairs: correlated, with a mean of their own."""
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + 0.05).astype(np.float32)


@pytest.mark.parametrize(("n_pairs", "shrinkage"), [(500, 0.1), (7, 0.05), (1, 0.5), (500, 1.0)])
def test_learned_whitening_solves_the_generalised_eigenproblem(n_pairs, shrinkage):
    x, d = descriptors().astype(np.float64), pairs(n_pairs).astype(np.float64)
    learned = fit_learned_whitening([x], [d], dim=9, shrinkage=shrinkage)
    c = d.T @ d / n_pairs
    metric = (1 - shrinkage) * c + shrinkage * np.trace(c) / 24 * np.eye(24)
    values, vectors = scipy.linalg.eigh(np.cov(x.T, bias=True), metric)  # vectors.T @ metric @ vectors = 1
    expected = vectors[:, ::-1][:, :9]
    signs = np.sign((learned.projection * (metric @ expected)).sum(axis=0))
    np.testing.assert_allclose(learned.projection, expected * signs, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(learned.eigenvalues, values[::-1], rtol=1e-6, atol=1e-12)


def test_learned_whitening_of_fewer_images_than_dimensions():
    learned = fit_learned_whitening([descriptors()[:10]], [pairs(5)])
    assert learned.dim == learned.supported_dim == 9
    assert np.isfinite(learned.transform(descriptors())).all()
    with pytest.raises(UserError, match=r"dim 10: .* support 1 to 9"):
        fit_learned_whitening([descriptors()[:10]], [pairs(5)], dim=10)


def test_learned_whitening_in_pieces_and_back_from_disk(tmp_path):
    x, d = descriptors(), pairs()
    whole = fit_learned_whitening([x], [d], dim=12)
    cut = fit_learned_whitening((x[i : i + 7] for i in range(0, 400, 7)), (d[i : i + 3] for i in range(0, 500, 3)), 12)
    np.testing.assert_allclose(cut.projection, whole.projection, rtol=1e-6, atol=1e-8)
    whole.save(tmp_path / "w.npz")
    loaded = PCAWhitening.load(tmp_path / "w.npz")
    assert isinstance(loaded, LearnedWhitening) and (loaded.n, loaded.n_pairs, loaded.supported_dim) == (400, 500, 24)
    assert loaded.sha256() == whole.sha256()
    np.testing.assert_array_equal(loaded.transform(x), whole.transform(x))


@pytest.mark.parametrize(
    ("differences", "options", "message"),
    [
        ([], {}, "at least 1 pairs, here 0"),
        ([np.zeros((5, 24), np.float32)], {}, "pairs consist of equal descriptors"),
        ([np.full((5, 24), np.nan, np.float32)], {}, "pair 0 holds NaN"),
        ([pairs(width=8)], {}, "pairs have width 8, the database 24"),
        ([pairs()], {"shrinkage": 0.0}, "shrinkage 0"),
        ([pairs()], {"dim": 0}, "dim 0"),
    ],
)
def test_what_no_whitening_can_be_learned_from(differences, options, message):
    with pytest.raises(UserError, match=message):
        fit_learned_whitening([descriptors()], differences, **options)
