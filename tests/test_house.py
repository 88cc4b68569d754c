"""The house: which folder may import which, how many files there are, how long they get."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "metilr"
ORDER = (
    "", "metrics", "data", "sources", "download", "demo", "models", "extraction", "retrieval", "geometry", "evaluation",
    "report", "training", "collection", "auditing", "commands",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("pytorch_lightning", "timm", "torchvision", "torchmetrics", "wandb", "matplotlib")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> Iterator[str]:
    """The modules of metilr that a file imports anywhere, also within functions and for types alone."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "metilr":
            base = node.module.removeprefix("metilr").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if name in MODULES else base


def folder_of(module: str) -> str:
    folder = module.split(".")[0]
    return folder if folder in ORDER else ""


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_a_folder_imports_only_folders_above_it(module):
    below = [
        imported
        for imported in imports_of(MODULES[module])
        if ORDER.index(folder_of(imported)) > ORDER.index(folder_of(module))
    ]
    assert not below


def test_no_module_imports_itself_by_a_circle():
    edges = {
        module: {name for name in imports_of(file) if name != module} for module, file in MODULES.items() if module
    }
    while free := [module for module, names in edges.items() if not names & edges.keys()]:
        for module in free:
            del edges[module]
    assert not edges


def test_the_face_alone_names_modules_of_all_folders():
    """`metilr/__init__.py` imports lazily, so it is no circle; the command line names commands as text."""
    assert {folder_of(name) for name in imports_of(PACKAGE / "cli.py")} <= {""}


def test_the_house_does_not_grow():
    """What it has been brought down to, it keeps; the aim is 75 files and 10,500 lines.

    One file lies flat beyond the ground floor: ``onnx_embedder``, which others copy, so it imports nothing of metilr.
    """
    lines = {file: len(file.read_text().splitlines()) for file in FILES}
    assert len(FILES) <= 127 and len([file for file in FILES if file.parent == PACKAGE]) <= 9
    assert not list(imports_of(PACKAGE / "onnx_embedder.py"))
    assert sum(lines.values()) <= 21_658
    assert [str(file) for file, n in lines.items() if n > 300] == []


def loaded_after(code: str) -> set[str]:
    """Top-level names of what is imported once some code has run in a process of its own."""
    program = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_the_package_costs_nothing_to_import():
    assert not loaded_after("import metilr") & {"numpy", "torch", *HEAVY}


@pytest.mark.parametrize("folder", ["metrics", "data", "retrieval"])
def test_the_arrays_half_knows_no_lightning_and_no_timm(folder):
    modules = [f"metilr.{module}" for module in MODULES if folder_of(module) == folder and "torchmetrics" not in module]
    assert not loaded_after(f"import {', '.join(modules)}") & {"pytorch_lightning", "lightning_fabric", "timm"}


def test_retrieval_knows_no_images():
    imported = {
        folder_of(name)
        for module in MODULES
        if folder_of(module) == "retrieval"
        for name in imports_of(MODULES[module])
    }
    assert imported <= {"", "metrics", "retrieval"}


def test_options_and_finished_runs_are_read_without_heavy_libraries():
    modules = ("evaluation.options", "evaluation.runs", "report.published", "report.wandb", "report.page")
    loaded = loaded_after(f"import {', '.join(f'metilr.{module}' for module in modules)}")
    assert not loaded & {"torch", "faiss", "sklearn", *HEAVY}
