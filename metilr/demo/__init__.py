"""The built-in demo: a **synthetic** museum, drawn by program from a seed.

Nothing in it is a photograph of anything: exhibits are procedural drawings, and visitors' photographs are
simulated visits (`metilr.data.visits`) to them. Figures measured on it show that the whole way from image to GAP
works and whether a change moves it; they say nothing about real museums, and are to be called synthetic wherever
they appear.

The demo is written in the layout of the Met dataset, so it takes the same path through the program:

    ROOT/demo.json                       what drew it: version, seed, size, counts; written last
    ROOT/ground_truth/*.json             MET_database, mini_MET_database, valset, testset
    ROOT/images/MET/<id>/<n>.jpg         catalogue images
    ROOT/images/test_met|test_other|test_noart/<hash>.jpg

What makes it hard on purpose: one exhibit in seven is a near-twin of another, other museums' works come from the
same hands as the exhibits, and some visitors take bad photographs.
"""

from metilr.demo.museum import DEMO, draw_demo, make_demo
from metilr.demo.plan import MuseumSize

__all__ = ["DEMO", "MuseumSize", "draw_demo", "make_demo"]
