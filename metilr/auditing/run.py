"""The audit itself, from descriptors and files to all that was found."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from metilr import __version__
from metilr.auditing import labels
from metilr.auditing.groups import CopyOptions, Pictures, candidates, compare, group, leaked, nearest_images, thresholds
from metilr.auditing.looks import looks_of, read_facts
from metilr.auditing.schema import ERRORS, KINDS, Audit, Kind, Looked
from metilr.auditing.subject import Found, Subject

NEIGHBOURS = 20  # of each image in the database: an exhibit has one to a dozen images


def audit_images(
    subject: Subject,
    work: Path,
    options: CopyOptions | None = None,
    cases: Mapping[str, labels.Case] | None = None,
    fail_on: Sequence[Kind] = ERRORS,
    quiet: bool = True,
) -> Audit:
    """Look for copies, leaks, doubtful labels and bad images.

    Args:
        subject: What is audited.
        work: Folder for what takes long; what is there, of the same images and descriptors, is not done again.
        options: What counts as a copy.
        cases: Answers to the queries of each split, to say what leaks are worth.
        fail_on: Kinds that count as errors.
        quiet: Show no progress.
    """
    options = options or CopyOptions()
    work.mkdir(parents=True, exist_ok=True)
    facts = read_facts(subject, Found(work / "images.jsonl"), quiet)
    usable = subject.is_valid & np.array([not each.reason for each in facts])
    rows, n_database = subject.rows(work / "rows.npy"), len(subject.truth.paths["database"])
    k = max(NEIGHBOURS, options.copy_neighbours)
    near = nearest_images(rows[:n_database], rows, k, True, work / "database", quiet)
    pairs = candidates(subject, rows, near, usable, options, work, quiet)
    pictures = Pictures(subject)
    compared = compare(pictures, pairs, facts, Found(work / "pairs.jsonl"), quiet)
    groups = [*group(subject, facts, compared, options.copy_score)]
    is_leaked = leaked(subject, [images for _, images in groups])

    lying = Found(work / "photos.jsonl")
    doubts = labels.doubtful_photos(subject, near, rows, usable, pictures, facts, lying, quiet)
    own = labels.own_similarities(subject, rows)
    doubts += labels.unlike_images(subject, near, own)
    looks = [
        Looked(kind=kind, image=subject.said(i), said=said)
        for i, each in enumerate(facts)
        for kind, said in looks_of(each)
    ]
    looks += [
        Looked(kind="turned", image=subject.said(i), said=f"by {90 * member.quarter_turns}° to {copies.images[0].path}")
        for copies, images in groups for i, member in zip(images, copies.images, strict=True) if member.quarter_turns
    ]  # fmt: skip
    people = _in_both(subject)
    counts = Counter[Kind](copies.kind for copies, _ in groups)
    counts.update(doubt.kind for doubt in doubts)
    counts.update(look.kind for look in looks)
    counts["photographer"] = len(people)
    coverage = labels.confused_exhibits(subject, near, own)
    leakage = {
        split: labels.leakage_of(case, is_leaked[subject.split_of == subject.splits.index(split)])
        for split, case in (cases or {}).items()
    }
    origin = subject.descriptors.origins[0]
    return Audit(
        schema="metilr.audit/1", metilr=__version__, source=str(subject.truth.root),
        images={split: len(paths) for split, paths in subject.truth.paths.items()}, exhibits=subject.truth.n_classes,
        settings={**asdict(options), "model": origin.get("model"), "image_size": origin.get("image_size")},
        counts={kind: counts[kind] for kind in KINDS}, fail_on=list(fail_on),
        copies=sorted((copies for copies, _ in groups), key=lambda copies: KINDS.index(copies.kind)),
        thresholds=thresholds(subject, compared), leakage=leakage, labels=doubts, looks=looks, photographers=people,
        single_image=int((subject.truth.class_sizes() == 1).sum()), coverage=coverage,
    )  # fmt: skip


def _in_both(subject: Subject) -> list[str]:
    """Who has photos in val and in test; nobody where photographers are not named."""
    of = [subject.truth.photographers.get(split, np.empty(0, np.int64)) for split in ("val", "test")]
    both = np.intersect1d(of[0], of[1])
    return [subject.truth.photographer_names[number] for number in both[both >= 0].tolist()]
