"""CSV that is written; ``test_folder.py`` and ``test_results.py`` have what is refused of CSV that is read."""

import csv
import io

import pytest

from metilr.data.tables import as_csv, original, read_csv

FORMULAS = [
    "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''=1", "a\n=1", "a\r\n@b",
    "a\x0cb", "a\x00b", "a\u2028=1", "\uff1d1",
]  # fmt: skip
HARMLESS = ["", "'", "''", "'s-Hertogenbosch", "a=b", "Vase, blue", 'a "b"', "é", "MET/1/0.jpg", " =1", "1-2"]


@pytest.mark.parametrize("text", [*FORMULAS, *HARMLESS])
def test_text_comes_back_as_it_was(tmp_path, text):
    (tmp_path / "a.csv").write_text(as_csv([("path", "n"), (text, 1)]), encoding="utf-8", newline="")
    [(line, row)] = read_csv(tmp_path / "a.csv", ["path", "n"])
    assert (line, original(row["path"]), row["n"]) == (2, text, "1")


def test_no_cell_begins_as_a_formula_and_what_is_harmless_is_not_touched():
    written = as_csv([FORMULAS, HARMLESS])
    risky, harmless = csv.reader(io.StringIO(written, newline=""))
    assert risky == [f"'{text}" for text in FORMULAS]
    assert harmless == HARMLESS


def test_numbers_stay_numbers():
    assert as_csv([(-1, -0.5, 2.5e-20, True, None)]) == "-1,-0.5,2.5e-20,True,\r\n"
