"""Figures of one commit, to hold another against: `python tests/goldens.py make FOLDER` here, then `compare A B`.

Runs the two commands in FOLDER, each once, and writes FOLDER/goldens.json: digests of descriptors and whitening, the
answers, the figures, the losses. Leaves with the rebuilding that it guards.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TREE = Path(__file__).parents[1]
HARD = Path(os.environ.get("METILR_SHARED", TREE.parent / "shared")) / "museum_hard"
CPU = ["--accelerator", "cpu", "--num_workers", "2", "--report", "false", "--wandb", "off"]
BEST = str(TREE / "configs/eval/best_small_museum.yaml")
COMMANDS = {
    "demo": ["evaluate.py", *CPU],
    "hard": ["evaluate.py", "--root", HARD, "--backbone", "lite0_in", *CPU],
    "best": ["evaluate.py", "--root", HARD, "--backbone", "lite0_in", "--config", BEST, *CPU],
    "train": [
        "train.py", "--config", TREE / "configs/train/demo.yaml", "--trainer.max_epochs", "2", "--wandb", "off",
        "--trainer.accelerator", "cpu", "--trainer.precision", "32", "--trainer.enable_progress_bar", "false",
    ],
}  # fmt: skip
AFTER = {
    "identify": ("best", ["-m", "metilr", "identify", "--run", "best/out", "--json", "true", "--accelerator", "cpu"]),
}


def make(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    goldens = json.loads((folder / "goldens.json").read_text()) if (folder / "goldens.json").is_file() else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(TREE), "WANDB_MODE": "disabled"}
    for name in names or [*COMMANDS, *AFTER]:
        began = time.time()
        if name in COMMANDS:
            script, *arguments = COMMANDS[name]
            place = ["--output", f"{name}/out"] + (["--store", f"{name}/store"] if name != "train" else [])
            run(folder, [TREE / script, *arguments, *place], environment)
            goldens[name] = trained(folder / name) if name == "train" else evaluated(folder / name)
        else:
            _, arguments = AFTER[name]
            photos = (
                sorted((HARD / "images/test_met").glob("*.jpg"))[:4]
                + sorted((HARD / "images/test_noart").glob("*"))[:1]
            )
            said = run(folder, [*arguments, *photos], environment)
            goldens[name] = json.loads(
                said[said.index("[") :] if said.lstrip().startswith("[") else said[said.index("{") :]
            )
        print(f"{name}: {time.time() - began:.0f} s", flush=True)
        (folder / "goldens.json").write_text(json.dumps(goldens, indent=1))


def run(folder: Path, arguments: list, environment: dict) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def evaluated(place: Path) -> dict:
    results = json.loads((place / "out/results.json").read_text())
    parts = {name: results[name] for name in ("data", "model", "whitening", "knn", "val", "test")}
    predictions = {split: (place / f"out/predictions/{split}.csv").read_text() for split in ("val", "test")}
    with np.load(place / "out/whitening.npz") as whitening:
        sums = {f"whitening.{name}": digest(whitening[name].tobytes()) for name in whitening.files}
    for file in sorted((place / "store").rglob("*.npy")):
        sums[file.name if file.parent.name == "store" else f"{len(sums)} {file.name}"] = digest(file.read_bytes())
    return {"parts": parts, "predictions": predictions, "sums": sums}


def trained(place: Path) -> dict:
    losses = {}
    for file in sorted((place / "out").glob("csv*/metrics.csv")):
        with file.open(newline="") as stream:
            losses.update({row["step"]: row["train/loss"] for row in csv.DictReader(stream) if row["train/loss"]})
    return {"losses": losses}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def compare(old: Path, new: Path) -> int:
    before, after = (json.loads((folder / "goldens.json").read_text()) for folder in (old, new))
    differences = [line for name in after for line in differ(name, before[name], after[name])]
    print("\n".join(differences[:60]) or f"the same: {', '.join(after)}")
    return bool(differences)


def differ(name: str, before: object, after: object) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        lines = [f"{name}.{key}: only {'before' if key in before else 'after'}" for key in before.keys() ^ after.keys()]
        return lines + [
            line for key in before.keys() & after.keys() for line in differ(f"{name}.{key}", before[key], after[key])
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line for i, pair in enumerate(zip(before, after, strict=True)) for line in differ(f"{name}[{i}]", *pair)
        ]
    return [] if before == after else [f"{name}: {str(before)[:90]} -> {str(after)[:90]}"]


if __name__ == "__main__":
    action, *rest = sys.argv[1:]
    sys.exit(make(Path(rest[0]).resolve(), rest[1:]) if action == "make" else compare(Path(rest[0]), Path(rest[1])))
