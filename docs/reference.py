"""The API reference as web pages, from the docstrings: ``python docs/reference.py build/docs``, or ``make docs``.

Fails if a module cannot be imported, a docstring describes what its function or class does not have, or a link of a
page leads nowhere.
"""

import io
import logging
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

METRICS = ["metilr.metrics.torchmetrics", "metilr.metrics.functional", "metilr.metrics.open_set"]


def check_docstrings(package: str) -> list[str]:
    """Return what Griffe warns of, such as arguments that are described and do not exist."""
    import griffe

    warned = io.StringIO()
    handler = logging.StreamHandler(warned)
    handler.setLevel(logging.WARNING)
    logging.getLogger("griffe").addHandler(handler)
    places = [griffe.load(package, docstring_parser="google")]
    while places:
        place = places.pop()
        if place.docstring is not None:
            _ = place.docstring.parsed
        places += [member for member in place.members.values() if not member.is_alias]
    logging.getLogger("griffe").removeHandler(handler)
    return warned.getvalue().splitlines()


def build(folder: Path) -> None:
    """Write a page for each public module; whatever pdoc warns of is an error."""
    import numpy.typing
    import pdoc

    # In signatures its name, not the dozen types that it stands for.
    numpy.typing.ArrayLike = type("ArrayLike", (), {"__module__": "numpy.typing"})

    import metilr
    from metilr import metrics, training

    for package in (metilr, metrics):  # some names are imported when they are first asked for, which pdoc does not do
        for name in package.__all__:
            setattr(package, name, getattr(package, name))
    for name in [name for name in vars(training) if name.startswith("LazyInstance_")]:  # jsonargparse's
        delattr(training, name)
    pdoc.render.configure(docformat="google", footer_text=f"metilr {metilr.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="pdoc")
        pdoc.pdoc("metilr", *METRICS, output_directory=folder)


class _Page(HTMLParser):
    """The links of a page, what they can lead to, and names in code that pdoc has found nothing for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = {""}
        self.unknown = re.findall(r"<code>(metilr\.[\w.]+)</code>", text)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src"):
                self.links.add(value or "")
            elif name == "id":
                self.ids.add(value or "")


def broken_links(folder: Path) -> list[str]:
    """Name the links between the pages of a folder that lead nowhere; addresses elsewhere are not asked for."""
    pages = {file: _Page(file.read_text()) for file in folder.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        broken += [f"{file}: {name}: no such module, class or function" for name in page.unknown]
        for link in page.links:
            address = urlsplit(link)
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            if address.scheme or address.netloc:
                continue
            if not target.is_file():
                broken.append(f"{file}: {link}: no such file")
            elif target in pages and unquote(address.fragment) not in pages[target].ids:
                broken.append(f"{file}: {link}: no such place in the page")
    return sorted(broken)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    folder = Path(sys.argv[1]).resolve()
    found = check_docstrings("metilr")
    build(folder)
    found += broken_links(folder)
    print("\n".join(found) or f"{folder / 'index.html'}")
    sys.exit(1 if found else 0)
