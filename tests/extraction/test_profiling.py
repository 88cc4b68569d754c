import re

from rich.console import Console

from metilr.data.ground_truth import load_ground_truth
from metilr.extraction.describe import describe_images
from metilr.extraction.options import ExtractionOptions
from metilr.models.embedder import build_embedder


def test_an_extraction_says_where_its_time_went(tiny_museum, tmp_path, capsys):
    truth = load_ground_truth(tiny_museum)
    options = ExtractionOptions(accelerator="cpu", num_workers=0, quiet=True, profile=True)
    embedder = build_embedder("timm/test_resnet", "random")
    describe_images(embedder, truth, tmp_path / "store", options, Console(quiet=True))
    printed = capsys.readouterr().out
    seconds = dict(re.findall(r"^ *([a-z]+) +(\d+\.\d+) ", printed, flags=re.MULTILINE))
    assert list(seconds) == ["decoding", "transfer", "network", "waiting", "writing"]
    assert float(seconds["network"]) > 0  # decoding a few tiny images can round to 0
    describe_images(embedder, truth, tmp_path / "store", options, Console(quiet=True))
    assert not capsys.readouterr().out  # nothing was described
