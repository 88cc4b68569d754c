"""The full Met's counts, by which benchmarks make up descriptors."""

from metilr.report.published import MET_COUNTS, MET_QUERIES

ROWS = MET_COUNTS["full"]["database_images"]
CLASSES_PER_ROW = MET_COUNTS["full"]["exhibits"] / ROWS
QUERIES = {split: MET_QUERIES[f"{split}_queries"] for split in ("val", "test")}
MET = {split: MET_QUERIES[f"{split}_met"] for split in QUERIES}  # those of QUERIES that show an exhibit
