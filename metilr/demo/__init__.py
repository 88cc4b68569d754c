"""The built-in demo: a **synthetic** museum, drawn by program from a seed, in the layout of the Met dataset.

Nothing in it is a photograph: exhibits are procedural drawings, and visitors' photographs are simulated visits
(`metilr.data.visits`) to them. Figures measured on it show that the whole way from image to GAP works and whether a
change moves it; they say nothing about real museums, and are to be called synthetic wherever they appear.

What makes it hard on purpose: one exhibit in seven is a near-twin of another, other museums' works come from the
same hands as the exhibits, and some visitors take bad photographs.
"""

from metilr.demo.museum import DEMO, MuseumSize, draw_demo, make_demo

__all__ = ["DEMO", "MuseumSize", "draw_demo", "make_demo"]
