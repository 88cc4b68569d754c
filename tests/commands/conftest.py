"""One evaluation that tests of several commands read."""

import contextlib
import io
from pathlib import Path

import pytest

from tests.museum import write_museum
from tests.small_runs import evaluate

UNTRAINED = {"backbone": "timm/test_resnet", "weights": "random", "accelerator": "cpu", "num_workers": 0}


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory) -> Path:
    """A folder with a museum, its evaluation in out/, the descriptors in store/ and what was printed; to be read."""
    folder, printed = tmp_path_factory.mktemp("evaluated"), io.StringIO()
    write_museum(folder / "museum")
    with contextlib.redirect_stdout(printed):
        evaluate(folder / "museum", store=folder / "store", output=folder / "out", wandb="off", **UNTRAINED)
    (folder / "printed").write_text(" ".join(printed.getvalue().split()))
    return folder
