"""What Markdown files and docstrings name is there, and the checks of the API reference find what is not."""

import importlib.util
import itertools
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*.md")])
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FOLDERS = ("benchmarks", "configs", "docs", "metilr", "tests")


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def inline(page: Path) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or ()


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: list[str] = []
    for token, content in itertools.pairwise(tokens(page)):
        if token.type == "heading_open":
            text = "".join(child.content for child in content.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@EACH_PAGE
def test_links_lead_somewhere(page):
    """Addresses elsewhere are looked at, not asked for."""
    for token in inline(page):
        link = token.attrs.get("href", token.attrs.get("src"))
        if link is None:
            continue
        address = urlsplit(str(link))
        if address.scheme:
            assert address.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), link
            continue
        target = (page.parent / unquote(address.path)).resolve() if address.path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if address.fragment:
            assert address.fragment in headings(target), link


@EACH_PAGE
def test_files_that_are_named_exist(page):
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*]", page.read_text()):
        assert list(ROOT.glob(path)), path


@EACH_PAGE
def test_modules_and_what_they_hold_exist(page):
    for token in inline(page):
        if token.type == "code_inline" and re.fullmatch(r"metilr(\.\w+)+", token.content):
            pkgutil.resolve_name(token.content)


def test_docstrings_describe_what_is_there():
    assert reference.check_docstrings("metilr") == []


def test_a_docstring_that_describes_something_else_is_found(tmp_path, monkeypatch):
    (tmp_path / "mistaken.py").write_text(
        'def f(a: int) -> None:\n    """Do it.\n\n    Args:\n        b: Gone.\n    """\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    [*_, warning] = reference.check_docstrings("mistaken")
    assert "Parameter 'b' does not appear" in warning


def test_a_broken_link_of_the_reference_is_found(tmp_path):
    page, other = tmp_path / "a.html", tmp_path / "b" / "c.html"
    other.parent.mkdir()
    other.write_text('<a href="../a.html#here">a</a> <a href="https://example.org/#x">elsewhere</a>')
    page.write_text('<p id="here"><a href="#here">fine</a> <a href="b/c.html">fine</a> <code>metilr_x</code></p>')
    assert reference.broken_links(tmp_path) == []
    page.write_text(
        '<a href="#there">1</a> <a href="gone.html">2</a> <code>metilr.gone</code> <a href="b/c.html">3</a>'
    )
    assert [fault.split(": ")[1] for fault in reference.broken_links(tmp_path)] == [
        "#there",
        "gone.html",
        "metilr.gone",
        "../a.html#here",
    ]
