"""The database as it is searched: whitening, unit rows, what each shows, and the search with all views of a query."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metilr.data.ground_truth import GroundTruth
from metilr.errors import UserError, amount, one_line
from metilr.evaluation.options import MethodOptions
from metilr.extraction.store import CHUNK_ROWS, row_chunks
from metilr.models import is_on_hub
from metilr.progress import counted
from metilr.retrieval.knn import NO_ROW, Matches, top_matches
from metilr.retrieval.search import Neighbours, SearchDevice, device_for, ranked, search
from metilr.retrieval.whitening import PCAWhitening, fit_learned_whitening, fit_pca_whitening, whitening_from_parts

if TYPE_CHECKING:
    from metilr.data.views import View
    from metilr.extraction.descriptors import Descriptors
    from metilr.models.checkpoints import ClassWeights
    from metilr.retrieval.approximate import ApproximateIndex
    from metilr.retrieval.milvus import MilvusSearch

CHECKPOINTS = (".ckpt", ".safetensors")
ROUNDING = 1e-5  # similarities of float32 rows that are nearer than this count as equal
Parts = Sequence[np.ndarray]  # of descriptors, side by side, each (n, D_i)
Done = Callable[[int], None]  # told how many more are done


def views_of(method: MethodOptions, seed: int) -> "list[View]":
    """The views that must be described besides the images."""
    from metilr.data.views import CentreCrops, SimulatedVisits  # torchvision: comparing descriptors does without

    views: list[View] = [SimulatedVisits(method.n_visits, seed)] if method.n_visits else []
    return [*views, CentreCrops(tuple(method.query_crops))] if method.query_crops else views


def whitening_of(
    descriptors: "Descriptors", ground_truth: GroundTruth, method: MethodOptions, quiet: bool = True
) -> PCAWhitening | None:
    """Learn or load the whitening that the method asks for; None for none."""
    if method.whitening == "none":
        return None
    if method.whitening not in ("pca", "learned"):
        return load_whitening(method.whitening)
    with counted("learning whitening", int(descriptors.is_valid["database"].sum()), "rows", quiet) as done:
        database = _chunks(descriptors, "database", done)
        try:
            if not method.is_learned:
                return fit_pca_whitening(database, method.whitening_dim, method.whitening_shrinkage)
            pairs = pair_differences(descriptors, ground_truth)
            return fit_learned_whitening(database, pairs, method.whitening_dim, method.pair_shrinkage)
        except UserError as error:
            raise UserError(error.message, "whitening_dim" if error.parameter == "dim" else error.parameter) from None


def load_whitening(path: str | Path) -> PCAWhitening:
    """Read a whitening that was saved, or the one in a checkpoint that ``metilr pack`` wrote."""
    if not is_on_hub(path) and Path(path).suffix not in CHECKPOINTS:
        return PCAWhitening.load(path)
    import torch  # and timm: a saved whitening does without

    from metilr.models import checkpoints, hub

    path, _ = hub.locate(path, hub.CHECKPOINTS, "whitening")
    content = checkpoints.read_checkpoint(path).get("metilr")
    entry = content.get("whitening") if isinstance(content, Mapping) else None
    if entry is None:
        raise UserError(f"{path}: this checkpoint holds no whitening; metilr pack writes one that does", "whitening")
    try:
        parts = {name: part for name, part in entry.items() if isinstance(part, torch.Tensor)}
        if any(part.nelement() * part.element_size() > part.untyped_storage().nbytes() for part in parts.values()):
            raise ValueError("a tensor claims more numbers than the file has")
        kind = entry["kind"] if isinstance(entry["kind"], str) else "no text"
        return whitening_from_parts(kind, {name: np.array(part.numpy()) for name, part in parts.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"its whitening cannot be read ({one_line(error)})"
        raise UserError(f"{path}: {reason}; pack it anew", "whitening") from None


def pair_differences(descriptors: "Descriptors", ground_truth: GroundTruth) -> Iterator[np.ndarray]:
    """Differences of descriptors that show one exhibit, float32 ``(m, D)``: of images and visits, and of images."""
    images, is_valid = descriptors.parts["database"], descriptors.is_valid["database"]
    if "visits" in descriptors.parts:
        yield from visit_differences(images, descriptors.parts["visits"], is_valid)
    yield from exhibit_differences(images, np.where(is_valid, ground_truth.labels["database"], -1))


def visit_differences(images: Parts, visits: Parts, is_valid: np.ndarray) -> Iterator[np.ndarray]:
    """Differences of each image that counts, ``is_valid`` ``(n,)``, and each of its visits, float32 ``(m, D)``.

    Row ``i * n_visits + v`` of ``visits`` is visit v of image i.
    """
    n_visits = len(visits[0]) // len(is_valid)
    size = CHUNK_ROWS // n_visits + 1
    chunks_of_visits = row_chunks(visits, np.repeat(is_valid, n_visits), size * n_visits)
    for of_images, of_visits in zip(row_chunks(images, is_valid, size), chunks_of_visits, strict=True):
        differences = of_images[:, None] - of_visits.reshape(len(of_images), n_visits, -1)
        yield differences.reshape(-1, of_images.shape[1])


def exhibit_differences(images: Parts, labels: np.ndarray) -> Iterator[np.ndarray]:
    """Differences of each image and the next one of its exhibit, in a ring; labels below 0 are left out."""
    first, second = ring_pairs(labels)
    for start in range(0, len(first), CHUNK_ROWS):
        a, b = first[start : start + CHUNK_ROWS], second[start : start + CHUNK_ROWS]
        yield np.concatenate([part[a] - part[b] for part in images], axis=1, dtype=np.float32)


def ring_pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair each row with the next one of its label, and the last with the first: two arrays ``(P,)``; not labels < 0.

    A label with one row has no pair, one with two rows has one.
    """
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    following = np.arange(1, len(order) + 1)
    following[starts + counts - 1] = starts
    place_in_label = np.arange(len(order)) - np.repeat(starts, counts)
    is_pair = place_in_label < np.repeat(np.where(counts > 2, counts, counts - 1), counts)
    return order[is_pair], order[following[is_pair]]


@dataclass(frozen=True, eq=False)
class Searchable:
    """What queries are compared with."""

    rows: np.ndarray  # float32 (M, D), unit length; (0, D) where an engine alone has them
    labels: np.ndarray  # what each shows, int64 (M,)
    images: np.ndarray  # row of the ground truth's database that each was made from, or that shows it, int64 (M,)
    engine: "ApproximateIndex | MilvusSearch | None" = None  # searches in place of an exact search of ``rows``

    def nearest(
        self, queries: np.ndarray, k: int, device: SearchDevice = "cpu", done: Done = lambda n: None
    ) -> Neighbours:
        """Find the k rows most similar to each query, ``(Q, V, D)``: as similar as its most similar view.

        Of equal similarities the smaller row comes first. ``done`` is told how many more views were searched.
        """
        n_views, width = queries.shape[1:]
        views = queries.reshape(-1, width)
        if self.engine is None:
            neighbours = search(self.rows, views, k, device_for(device, k), done)
        else:
            neighbours = self.engine.search(views, k, done)
        return neighbours if n_views == 1 else _best_of_views(neighbours, n_views, k)

    def matches(self, queries: np.ndarray, neighbours: Neighbours, n: int, device: SearchDevice = "cpu") -> Matches:
        """The nearest row of each of the n nearest exhibits; searches on where ``neighbours`` show fewer."""
        n = min(n, len(np.unique(self.labels)))
        matches = top_matches(neighbours, self.labels, n)
        width = neighbours.rows.shape[1]
        while len(short := np.flatnonzero((matches.rows == NO_ROW).any(axis=1))):
            width = min(len(self.labels), 4 * width)
            wider = top_matches(self.nearest(queries[short], width, device), self.labels, n)
            matches.rows[short], matches.similarities[short] = wider.rows, wider.similarities
        return matches


def _best_of_views(neighbours: Neighbours, n_views: int, k: int) -> Neighbours:
    """Of the k nearest rows of each view, ``(Q * V, k)``, the k nearest of each query by its most similar view.

    A row among those is among the k nearest of the view that it is most similar to, so none is missed.
    """
    rows = neighbours.rows.reshape(-1, n_views * k)
    similarities = neighbours.similarities.reshape(-1, n_views * k)
    order = np.lexsort((-similarities, rows), axis=1)  # each row's greatest similarity first
    rows, similarities = (np.take_along_axis(values, order, axis=1) for values in (rows, similarities))
    similarities[:, 1:][rows[:, 1:] == rows[:, :-1]] = -np.inf
    return ranked(similarities, rows, k)


def build_searchable(
    descriptors: "Descriptors",
    ground_truth: GroundTruth,
    method: MethodOptions,
    whitening: PCAWhitening | None,
    quiet: bool = True,
    classifier: "ClassWeights | None" = None,
) -> Searchable:
    """Whiten the database's descriptors, and those of its visits where the method searches them too.

    ``database_rows`` may put ``prototypes_of`` these in their place, or ``class_rows_of`` a ``classifier``.
    """
    images, splits = np.flatnonzero(descriptors.is_valid["database"]), ["database"]
    if method.database_views == "rows":
        images, splits = np.concatenate([images, np.repeat(images, method.n_visits)]), ["database", "visits"]
    rows = _unit_rows(descriptors, splits, whitening, quiet)
    of_images = Searchable(rows, ground_truth.labels["database"][images], images)
    if classifier is not None:
        return class_rows_of(of_images, classifier, ground_truth.exhibit_ids)
    return prototypes_of(of_images) if method.database_rows == "prototypes" else of_images


def prototypes_of(images: Searchable) -> Searchable:
    """Take the mean of each exhibit's images, as they are compared (whitened, of unit length), at unit length again.

    After the whitening, as a classifier behind a whitening projector sees them: its class weights can start there.
    ``images`` of the result names the image most similar to each prototype, the first of equals: it stands for the
    exhibit wherever an image is shown or its local features are compared. Exhibits without a row have none.
    """
    labels, place = np.unique(images.labels, return_inverse=True)
    sums = np.zeros((len(labels), images.rows.shape[1]))
    np.add.at(sums, place, images.rows)
    rows = as_compared(sums, None)
    return Searchable(rows, labels, nearest_images(images, rows, labels))


def class_weights_of(
    method: MethodOptions, ckpt: str | Path | None, ground_truth: GroundTruth
) -> "ClassWeights | None":
    """Read the class weights if the method searches them; refuses exhibits that they do not know."""
    if method.database_rows != "classifier":
        return None
    if ckpt is None:
        remedy = "give the ckpt of a training with a classifier, or choose images or prototypes"
        raise UserError(f"classifier: needs class weights; {remedy}", "database_rows")
    from metilr.models.checkpoints import load_class_weights  # torch and timm

    weights = load_class_weights(ckpt)
    unknown = np.setdiff1d(ground_truth.exhibit_ids, weights.exhibit_ids)
    if len(unknown):
        which = f"{', '.join(map(str, unknown[:3].tolist()))}{', ...' if len(unknown) > 3 else ''}"
        what = f"{ckpt} does not know {amount(len(unknown), 'exhibit')} of {ground_truth.root} ({which})"
        remedy = "train it on this database, or choose images or prototypes"
        raise UserError(f"classifier: {what}; {remedy}", "database_rows")
    return weights


def class_rows_of(images: Searchable, weights: "ClassWeights", exhibit_ids: np.ndarray) -> Searchable:
    """Search class weights, of all ``exhibit_ids`` ``(n_classes,)`` and perhaps others, in place of images.

    Left out are those of exhibits that the database does not have, such as the mini one, or that have no image with a
    descriptor. ``images`` of the result is as of ``prototypes_of``.
    """
    labels = np.searchsorted(exhibit_ids, weights.exhibit_ids)
    is_there = np.isin(weights.exhibit_ids, exhibit_ids[np.unique(images.labels)])
    rows, labels = as_compared(weights.rows[is_there], None), labels[is_there]
    return Searchable(rows, labels, nearest_images(images, rows, labels))


def nearest_images(images: Searchable, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The image of its own exhibit that each row ``(M, D)``, of exhibits ``labels``, resembles most: ``(M,)``.

    Each label has an image. Of equally similar ones the first is taken, up to rounding: of two images both are as near
    to their mean.
    """
    by_label = np.argsort(images.labels, kind="stable")
    starts, ends = (np.searchsorted(images.labels[by_label], labels, side=side) for side in ("left", "right"))
    spans = [by_label[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    nearest = np.empty(len(rows), dtype=np.int64)
    for i, (span, row) in enumerate(zip(spans, rows, strict=True)):
        similarities = images.rows[span] @ row
        nearest[i] = span[(similarities > similarities.max() - ROUNDING).argmax()]
    return images.images[nearest]


def query_views(
    descriptors: "Descriptors", split: str, method: MethodOptions, whitening: PCAWhitening | None, quiet: bool = True
) -> np.ndarray:
    """Descriptors of the queries that have one and of their crops, as they are searched: ``(n valid, V, D)``."""
    whole = _unit_rows(descriptors, [split], whitening, quiet)[:, None]
    if not method.query_crops:
        return whole
    crops = _unit_rows(descriptors, [f"{split}_crops"], whitening, quiet)
    return np.concatenate([whole, crops.reshape(len(whole), len(method.query_crops), whole.shape[2])], axis=1)


def _unit_rows(
    descriptors: "Descriptors", splits: Sequence[str], whitening: PCAWhitening | None, quiet: bool
) -> np.ndarray:
    """Rows of splits one after another as they are compared, float32 ``(n valid, D)``, of unit length."""
    n_rows, start = sum(int(descriptors.is_valid[split].sum()) for split in splits), 0
    ready = np.empty((n_rows, descriptors.width if whitening is None else whitening.dim), dtype=np.float32)
    with counted(f"whitening {' and '.join(splits)}", n_rows, "rows", quiet) as done:
        for split in splits:
            for chunk in _chunks(descriptors, split, done):
                ready[start : start + len(chunk)] = as_compared(chunk, whitening)
                start += len(chunk)
    return ready


def _chunks(descriptors: "Descriptors", split: str, done: Done) -> Iterator[np.ndarray]:
    for chunk in row_chunks(descriptors.parts[split], descriptors.is_valid[split]):
        yield chunk
        done(len(chunk))


def as_compared(rows: np.ndarray, whitening: PCAWhitening | None) -> np.ndarray:
    """Whiten rows ``(n, D)`` if asked for, and give them unit length."""
    if whitening is None:
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)  # in float32 large ones are infinite
        return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return whitening.transform(rows)
