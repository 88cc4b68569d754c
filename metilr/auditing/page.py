"""``audit.html``: what an audit found, pictures first, read from disk without a server."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from metilr.auditing.schema import KINDS, MEANINGS, Audit, Image
from metilr.data.decode import BadImageError
from metilr.data.ground_truth import GroundTruth
from metilr.files import write_atomically
from metilr.progress import printable, tracked
from metilr.report.page import THREADS, jpeg_thumbnail

PICTURED = 200  # findings of a kind that are on the page; the lists have all
MEMBERS = 12  # images of a group
CONFUSED = 20  # exhibits


def write_page(folder: Path, found: Audit, truth: GroundTruth, quiet: bool = False) -> Path:
    """Write the page and its pictures into a folder."""
    import jinja2

    sections = {kind: [*_cards(found, kind)][:PICTURED] for kind in KINDS}
    sections = {kind: cards for kind, cards in sections.items() if cards}
    coverage = found.coverage[:CONFUSED]
    wanted = {image.path for cards in sections.values() for card in cards for image in card["images"]}
    wanted |= {image.path for each in coverage for image in each.images}
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    (folder / "pictures").mkdir()
    names = {path: f"{number}.jpg" for number, path in enumerate(sorted(wanted))}

    def write(path: str) -> str | None:
        try:
            (folder / "pictures" / names[path]).write_bytes(jpeg_thumbnail(truth.image(path)))
        except BadImageError:
            return None
        return path

    with ThreadPoolExecutor(THREADS) as pool:
        written = tracked(pool.map(write, names), "pictures of the page", len(names), "pictures", quiet)
        pictures = {path: f"pictures/{names[path]}" for path in written if path is not None}
    templates = Path(__file__).parents[1] / "report" / "templates"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(templates), autoescape=True)
    environment.filters["shown"] = printable
    page = environment.get_template("audit.html").render(
        found=found, sections=sections, coverage=coverage, pictures=pictures, meanings=MEANINGS, pictured=PICTURED
    )
    for name in ("style.css", "audit_page.js"):
        shutil.copy(templates / name, folder / name)
    write_atomically(folder / "audit.html", page)
    return folder / "audit.html"


def _cards(found: Audit, kind: str) -> Iterator[dict[str, Any]]:
    """What there is to see of a kind: images with a caption each, and a sentence."""
    for copies in found.copies:
        if copies.kind == kind:
            same = {"bytes": "the same file", "pixels": "the same pixels", "picture": f"score {copies.score:.3f}"}
            more = f", {len(copies.images):,} images" if len(copies.images) > MEMBERS else ""
            notes = [_turned(image) for image in copies.images[:MEMBERS]]
            yield {"images": copies.images[:MEMBERS], "notes": notes, "said": same[copies.same] + more}
    for doubt in found.labels:
        if doubt.kind == kind:
            points = "" if doubt.inliers is None else f", {doubt.inliers} points lie on it"
            own = "" if doubt.own_inliers is None else f", {doubt.own_inliers} on its own"
            said = f"seems to show {doubt.seen}: similarity {doubt.similarity:.3f}{points}{own}"
            yield {"images": [doubt.image, doubt.nearest], "notes": ["", ""], "said": said}
    for look in found.looks:
        if look.kind == kind:
            yield {"images": [look.image], "notes": [""], "said": look.said}


def _turned(image: Image) -> str:
    turns = 90 * getattr(image, "quarter_turns", 0)
    mirrored = ["mirrored"] if getattr(image, "mirrored", False) else []
    return ", ".join([*mirrored, *([f"turned by {turns}°"] if turns else [])])
