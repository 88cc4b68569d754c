"""Copies among all images: candidates by descriptors, the pictures themselves where that is not enough, and groups."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from metilr.auditing.copies import RECIPE, Likeness, Sketch, likeness, mirrored, sketch
from metilr.auditing.looks import Facts
from metilr.auditing.schema import Copies, Group, Member, Same, Threshold
from metilr.auditing.subject import Found, Subject
from metilr.data.decode import load_image
from metilr.errors import UserError
from metilr.files import replaced_file
from metilr.progress import counted, tracked
from metilr.retrieval.search import Neighbours, search

BLOCK = 4096  # images searched at a time, and kept
SKETCHES = 1000  # in memory, and so many mirrored ones: 0.3 MB each
SEVERAL = 3  # exhibits that share a picture of none
SCORES = (0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99)  # of the curve

Pair = tuple[int, int]  # of images, the smaller first


@dataclass(frozen=True)
class CopyOptions:
    """What counts as a copy.

    Attributes:
        copy_score: Images whose details correlate so far, everywhere, laid on each other, are copies of one picture.
        copy_similarity: Images are laid on each other from this similarity of their descriptors on.
        copy_neighbours: So many of each image's nearest ones.
    """

    copy_score: float = 0.93
    copy_similarity: float = 0.8
    copy_neighbours: int = 5

    def __post_init__(self) -> None:
        for name in ("copy_score", "copy_similarity"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{getattr(self, name)}: choose a number above 0, at most 1", name)
        if self.copy_neighbours < 1:
            raise UserError(f"{self.copy_neighbours}: choose 1 or more", "copy_neighbours")


def nearest_images(rows: np.ndarray, queries: np.ndarray, k: int, among: bool, folder: Path, quiet: bool) -> Neighbours:
    """The k nearest of ``rows`` ``(N, D)`` to each of ``queries`` ``(Q, D)``, exactly, block by block.

    Blocks that are in ``folder``, for this k, are not searched again. ``among`` says that the first N queries are the
    rows themselves: a row is no neighbour of its own.
    """
    k = min(k, len(rows) - 1)
    folder = folder.with_name(f"{folder.name}-{k}")
    folder.mkdir(exist_ok=True)
    found = []
    with counted("comparing descriptors", len(queries), "images", quiet) as done:
        for start in range(0, len(queries), BLOCK):
            stop, file = min(start + BLOCK, len(queries)), folder / f"{start}.npz"
            if not file.exists():
                block = search(rows, np.asarray(queries[start:stop]), k + 1)
                kept = block.rows != (np.arange(start, stop)[:, None] if among else -1)
                kept[kept.all(axis=1), -1] = False  # one too many
                with replaced_file(file) as stream:
                    np.savez(stream, s=block.similarities[kept].reshape(-1, k), r=block.rows[kept].reshape(-1, k))
            with np.load(file) as block_of:
                found.append((block_of["s"], block_of["r"]))
            done(stop - start)
    similarities, nearest = (np.concatenate(each) for each in zip(*found, strict=True))
    return Neighbours(similarities, nearest)


def candidates(
    subject: Subject, rows: np.ndarray, near: Neighbours, usable: np.ndarray, options: CopyOptions, work: Path,
    quiet: bool,
) -> list[Pair]:  # fmt: skip
    """Pairs whose descriptors are so similar that their pictures are to be compared.

    ``near`` are the nearest of the database to all; queries are compared with each other here. Both images of a pair
    are ``usable``, bool ``(n,)``.
    """
    n_database = len(subject.truth.paths["database"])
    pairs = _similar(near, 0, options)
    if len(rows) - n_database > 1:
        queries = rows[n_database:]
        of_queries = nearest_images(queries, queries, options.copy_neighbours, True, work / "queries", quiet)
        pairs |= _similar(of_queries, n_database, options)
    return sorted((a, b) for a, b in pairs if usable[a] and usable[b])


def _similar(near: Neighbours, offset: int, options: CopyOptions) -> set[Pair]:
    ours, places = np.nonzero(near.similarities[:, : options.copy_neighbours] >= options.copy_similarity)
    pairs = np.sort(np.stack([ours, near.rows[ours, places]], axis=1), axis=1) + offset
    return {(int(a), int(b)) for a, b in np.unique(pairs, axis=0)}


class Pictures:
    """Sketches of a subject's images, the last of them in memory."""

    def __init__(self, subject: Subject) -> None:
        def of(i: int) -> Sketch:
            return sketch(load_image(subject.file(i)).permute(1, 2, 0).numpy())

        known: Callable[[int], Sketch] = functools.lru_cache(SKETCHES)(of)
        self.sketch = known
        self.mirrored: Callable[[int], Sketch] = functools.lru_cache(SKETCHES)(lambda i: mirrored(known(i)))


def compare(
    pictures: Pictures, pairs: Sequence[Pair], facts: Sequence[Facts], found: Found, quiet: bool
) -> dict[Pair, Likeness]:
    """How far the images of each pair are copies; those of equal pixels are."""
    compared = {}
    for a, b in tracked(pairs, "comparing pictures", len(pairs), "pairs", quiet):
        if facts[a].pixels == facts[b].pixels:
            compared[a, b] = Likeness(1.0)
            continue
        key = key_of(facts[a], facts[b])
        if key not in found.known:
            found.add(key, [*likeness(pictures.sketch(a), pictures.sketch(b), pictures.mirrored(b))])
        compared[a, b] = Likeness(*found.known[key])
    return compared


def key_of(first: Facts, second: Facts) -> str:
    """Under which two images' comparison is kept: their pixels, and how they were compared."""
    return f"{RECIPE} {first.pixels[:20]} {second.pixels[:20]}"


def group(
    subject: Subject, facts: Sequence[Facts], compared: Mapping[Pair, Likeness], score: float
) -> Iterator[tuple[Copies, list[int]]]:
    """Groups of copies, each with its images: what a chain of pairs links, of equal files and of such a score."""
    links = {pair: like for pair, like in compared.items() if like.score >= score}
    links |= {pair: Likeness(1.0) for pair in _of_equal_pixels(facts)}
    for images, pairs in _linked(links, len(facts)):
        parts = [images]
        in_database = [i for i in images if subject.split_of[i] == 0]
        if len(in_database) < len(images) and kind_of(subject, in_database) != "duplicate":
            parts.append(in_database)  # a leak, and under several exhibits as well
        score_of_all = min(links[pair].score for pair in pairs)
        for part in parts:
            likes = [links.get((part[0], i), Likeness(1.0)) for i in part]
            members = [
                Member(**dict(subject.said(i)), mirrored=like.mirrored, quarter_turns=like.quarter_turns)
                for i, like in zip(part, likes, strict=True)
            ]
            hashes = ({facts[i].sha256 for i in part}, {facts[i].pixels for i in part})
            same: Same = "bytes" if len(hashes[0]) == 1 else "pixels" if len(hashes[1]) == 1 else "picture"
            yield Copies(kind=kind_of(subject, part), same=same, score=score_of_all, images=members), part


def kind_of(subject: Subject, images: Sequence[int]) -> Group:
    """What copies come to: on two sides of the evaluation, under several exhibits (or one and none), or neither."""
    if len(set(subject.split_of[images].tolist())) > 1:
        return "leak"
    labels = set(subject.labels[images].tolist())
    if len(labels) < 2:
        return "duplicate"
    return "placeholder" if len(labels) >= SEVERAL else "two_exhibits"


def leaked(subject: Subject, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Which images are queries that have a copy in another split, bool ``(n,)``."""
    is_leaked = np.zeros(len(subject.paths), dtype=bool)
    for images in groups:
        if len(set(subject.split_of[images].tolist())) > 1:
            is_leaked[images] = True
    return is_leaked & (subject.split_of > 0)


def thresholds(subject: Subject, compared: Mapping[Pair, Likeness]) -> list[Threshold]:
    """How many pairs, and queries with a copy elsewhere, each of ``SCORES`` would find."""
    curve = []
    for score in SCORES:
        pairs = [pair for pair, like in compared.items() if like.score >= score]
        across = [pair for pair in pairs if subject.split_of[pair[0]] != subject.split_of[pair[1]]]
        queries = {i for pair in across for i in pair if subject.split_of[i] > 0}
        curve.append(Threshold(score=score, pairs=len(pairs), leaked=len(queries)))
    return curve


def _of_equal_pixels(facts: Sequence[Facts]) -> Iterator[Pair]:
    by_pixels: dict[str, list[int]] = defaultdict(list)
    for i, each in enumerate(facts):
        if each.pixels:
            by_pixels[each.pixels].append(i)
    for images in by_pixels.values():
        yield from pairwise(images)


def _linked(links: Mapping[Pair, Likeness], n: int) -> list[tuple[list[int], list[Pair]]]:
    """Images that pairs link, directly or by others, in their order, with these pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.array([*links], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    found: dict[int, tuple[list[int], list[Pair]]] = defaultdict(lambda: ([], []))
    for i in np.unique(ends).tolist():
        found[int(component[i])][0].append(i)
    for pair in links:
        found[int(component[pair[0]])][1].append(pair)
    return list(found.values())
