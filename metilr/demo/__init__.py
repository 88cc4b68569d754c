"""The built-in demo: a **synthetic** museum, drawn by program from a seed, in the layout of the Met dataset.

Nothing in it is a photograph: exhibits are procedural drawings, and visitors' photographs are simulated visits
(`metilr.data.visits`) to them. Figures measured on it show that the whole way from image to GAP works and whether a
change moves it; they say nothing about real museums, and are to be called synthetic wherever they appear.

What makes it hard on purpose: one exhibit in seven is a near-twin of another, other museums' works come from the
same hands as the exhibits, and some visitors take bad photographs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metilr.demo.museum import MuseumSize, make_demo

__all__ = ["DEMO", "MuseumSize", "draw_demo", "make_demo"]

DEMO = Path("runs/demo")
"""Where commands without a data root draw it."""


def __getattr__(name: str) -> Any:
    """Import what draws when it is first asked for: it needs PyTorch, which a command's help does not."""
    if name not in ("MuseumSize", "make_demo"):
        raise AttributeError(name)
    from metilr.demo import museum

    return getattr(museum, name)


def draw_demo(root: Path, seed: int = 0) -> None:
    """Draw the synthetic museum of the demo, in the Met's layout.

    ``metilr evaluate`` draws it for itself when no ``--root`` is given: a place to try every command without a
    download. No image in it is a photograph; figures measured on it say nothing about real museums.

    Args:
        root: Folder to write, and what ``--root`` of other commands then takes. A demo already there is kept if
            it is the same and replaced if not; a folder with anything else in it is refused.
        seed: Another seed, from 0 up, gives another museum.
    """
    from metilr.demo.museum import make_demo

    print(f"the demo is in {make_demo(root, seed)}")
