"""``python train.py`` as a user runs it, on a tiny museum with a real (untrained) network."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from metilr.cli import run_command, run_main
from metilr.data.decode import load_image
from metilr.data.ground_truth import load_ground_truth
from metilr.data.visits import derive_seed
from metilr.evaluation.options import VISITS
from metilr.models.embedder import build_embedder
from metilr.retrieval.whitening import fit_learned_whitening
from metilr.training.augmentations import SimulatedVisit
from metilr.training.module import P_BOUNDS, FineTuning
from tests.museum import write_ground_truth
from tests.small_runs import evaluate

REPOSITORY = Path(__file__).resolve().parents[2]
NTXENT = ["--model.loss", "pytorch_metric_learning.losses.NTXentLoss", "--model.loss.temperature", "0.1"]
CONTRASTIVE = ["--model.loss", "metilr.training.losses.ContrastiveLoss"]
TINY = [
    "--data.root", "museum", "--model.backbone", "r18_in", "--model.weights", "random",
    "--data.first_view", "RandomCrop",
    "--data.first_view.size", "40", "--data.second_view", "SimulatedVisit", "--data.second_view.size", "40",
    "--data.batch_pairs", "4", "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.precision", "32",
    "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "2", "--wandb", "off",
]  # fmt: skip


@pytest.fixture(autouse=True)
def museum(tiny_museum, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # what runs leave behind goes there
    return tiny_museum


def run(*options: object) -> None:
    run_main("metilr.training.cli:train", [*TINY, *(str(option) for option in options)], prog="train.py")


def command(*options: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *TINY, *(str(option) for option in options)]


def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def error_of(capsys, *options: object) -> str:
    """The one line that a user's mistake ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("train.py: error: "), lines
    return lines[0]


def metrics_of(folder: str | Path) -> list[dict[str, str]]:
    with (Path(folder) / "csv" / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def column(folder: str | Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics_of(folder) if row.get(name)]


def checkpoint(file: str | Path) -> dict:
    return torch.load(file, weights_only=True)


def test_a_run_leaves_checkpoints_metrics_and_options(capsys):
    run("--output", "out", "--data.pairing", "syn+neg", *CONTRASTIVE)
    assert {"best.ckpt", "last.ckpt", "config.yaml", "csv", "finished"} <= {file.name for file in Path("out").iterdir()}
    assert len(column("out", "train/loss")) == 2 * 4  # 8 images, a positive and a negative each, in batches of 4 pairs
    assert len(column("out", "val/gap")) == 1 + 2
    for name in ("train/positive_similarity", "train/negative_similarity", "train/active_hinges", "train/p", "val/acc"):
        assert column("out", name), name
    entry = checkpoint("out/best.ckpt")["metilr"]
    assert entry["model"]["backbone"] == "r18_in" and entry["data"]["counts"]["database_images"] == 8
    assert entry["config"] == yaml.safe_load(Path("out/config.yaml").read_text())
    printed = capsys.readouterr().out
    assert "epoch 2 of 2: loss " in printed and "v_num" not in printed
    assert "python evaluate.py --ckpt" in printed and "out/best.ckpt --root museum" in " ".join(printed.split())


@pytest.mark.parametrize("projector", [[], ["--model.projector_dim", "5"]])
def test_evaluation_of_the_checkpoint_gives_what_validation_logged(projector):
    run("--output", "out", "--trainer.max_epochs", "1", *projector)
    options = ["--scales", "1", "--k", "1", "--tau", "1", "--whitening", "none", "--accelerator", "cpu"]
    run_command(
        "metilr.commands.evaluate:evaluate",
        ["--ckpt", "out/last.ckpt", "--root", "museum", *options, "--num_workers", "0", "--output", "results"],
    )
    figures = json.loads(Path("results/results.json").read_text())["val"]
    for name in ("gap", "gap_minus", "acc"):
        assert column("out", f"val/{name}")[-1] == pytest.approx(figures[name], abs=1e-6)


def test_test_is_never_read(museum):
    (museum / "ground_truth" / "testset.json").unlink()
    for file in museum.glob("images/*/test*"):
        file.unlink()
    run("--output", "out", "--data.pairing", "syn+neg", *CONTRASTIVE)


def test_batchnorm_statistics_stay_and_weights_move():
    run("--output", "out", "--data.pairing", "syn+neg", "--model.lr", "1e-3", "--model.warmup_steps", "0")
    start = FineTuning("r18_in", "random").state_dict()
    end = checkpoint("out/last.ckpt")["state_dict"]
    for name, tensor in start.items():
        is_statistic = "running_" in name or "num_batches" in name
        assert torch.equal(tensor, end[name]) == (is_statistic or name.endswith((".mean", ".std", "pooling.p"))), name


def test_frozen_backbone_trains_the_projector_alone():
    run("--output", "out", "--model.freeze_backbone", "true", "--model.projector_dim", "4")
    start = FineTuning("r18_in", "random", freeze_backbone=True, projector_dim=4).state_dict()
    end = checkpoint("out/last.ckpt")["state_dict"]
    changed = {name for name, tensor in start.items() if not torch.equal(tensor, end[name])}
    assert changed == {"embedder.projector.linear.weight", "embedder.projector.linear.bias"}


def test_the_projector_starts_as_whitening():
    run("--output", "out", "--model.freeze_backbone", "true", "--model.projector_dim", "4", "--model.lr", "0")
    evaluate(root=Path("museum"), ckpt=Path("out/last.ckpt"), scales=[1], whitening="none", k=1, tau=1,
             accelerator="cpu", num_workers=0, output=Path("a"), store=Path("projected"))  # fmt: skip
    evaluate(root=Path("museum"), backbone="r18_in", weights="random", scales=[1], whitening_dim=4, k=1, tau=1,
             accelerator="cpu", num_workers=0, output=Path("b"))  # fmt: skip
    a, b = (json.loads(Path(f"{name}/results.json").read_text()) for name in "ab")
    assert a["val"]["gap"] == pytest.approx(b["val"]["gap"], abs=1e-6)
    rows = np.load("projected/database.npy")
    assert rows.shape == (8, 4)


def test_the_projector_starts_as_whitening_learned_from_simulated_visits():
    """Against the same whitening of images and visits described one by one."""
    frozen = ["--model.freeze_backbone", "true", "--model.projector_dim", "4", "--model.lr", "0"]
    run("--output", "out", *frozen, "--model.projector_start", "learned", "--trainer.max_epochs", "1")
    truth = load_ground_truth(Path("museum"))
    paths = truth.paths["database"]
    plain = build_embedder("r18_in", "random")
    visit = SimulatedVisit(40)

    def pooled(image: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return plain(plain.normalise(image[None]))[0].numpy()

    images = np.array([pooled(load_image(truth.image(path))) for path in paths])
    differences = [
        row - pooled(visit(load_image(truth.image(path)), derive_seed(0, path, number)))
        for row, path in zip(images, paths, strict=True)
        for number in range(VISITS)
    ]
    labels = truth.labels["database"].tolist()  # of those with two images both are a pair as well
    differences += [images[i] - images[j] for i, j in itertools.combinations(range(8), 2) if labels[i] == labels[j]]
    expected = fit_learned_whitening([images], [np.array(differences)], dim=4)
    start = checkpoint("out/last.ckpt")["state_dict"]
    weight, bias = (start[f"embedder.projector.linear.{name}"].numpy() for name in ("weight", "bias"))
    found, wanted = images @ weight.T + bias, (images - expected.mean) @ expected.projection
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())


def test_learned_p_stays_in_bounds_and_has_no_weight_decay():
    run("--output", "out", "--model.learn_p", "true", "--model.lr_p", "100", "--model.warmup_steps", "0")
    assert P_BOUNDS[0] <= checkpoint("out/last.ckpt")["state_dict"]["embedder.pooling.p"].item() <= P_BOUNDS[1]
    groups = {group["name"]: group for group in checkpoint("out/last.ckpt")["optimizer_states"][0]["param_groups"]}
    assert groups["p"]["weight_decay"] == 0 and groups["backbone"]["weight_decay"] == 0.01


@pytest.mark.parametrize("loss", [CONTRASTIVE, NTXENT], ids=["contrastive", "ntxent"])
def test_four_pairs_are_overfitted(loss, museum):
    """Two exhibits, fixed views: positives come together, negatives apart."""
    database = json.loads((museum / "ground_truth" / "MET_database.json").read_text())
    write_ground_truth(museum, [e for e in database if e["id"] in (9, 41)][1:], [
        {"path": "test_met/val0.jpg", "MET_id": 9}], None)  # fmt: skip
    run(
        "--output", "out", "--data.pairing", "syn+neg", "--data.n_views", "1", "--model.lr", "1e-3",
        "--model.warmup_steps", "0", "--model.schedule", "constant", "--trainer.max_epochs", "25",
        "--model.backbone", "timm/test_resnet", *loss,
    )  # fmt: skip
    losses = column("out", "train/loss")
    assert losses[-1] < 0.1 * losses[0]
    assert column("out", "train/positive_similarity")[-1] > column("out", "train/negative_similarity")[-1] + 0.5


def test_the_same_command_gives_the_same_weights_with_any_number_of_decoding_processes():
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        run("--output", name, "--data.pairing", "syn+neg", "--data.num_workers", workers)
    a, b, c = (checkpoint(f"{name}/last.ckpt")["state_dict"] for name in "abc")
    for name in a:
        assert torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]), name


def test_two_processes_give_the_losses_and_weights_of_one():
    options = ["--data.pairing", "syn+real+neg", "--model.lr", "1e-4", "--model.warmup_steps", "0", *NTXENT]
    for name, devices in (("one", 1), ("two", 2)):
        subprocess.run(
            command("--output", name, "--trainer.devices", devices, *options),
            env=environment(), check=True, timeout=300, capture_output=True,
        )  # fmt: skip
    assert column("two", "train/loss") == pytest.approx(column("one", "train/loss"), abs=1e-4)
    start = FineTuning("r18_in", "random").state_dict()
    one, two = (checkpoint(f"{name}/last.ckpt")["state_dict"] for name in ("one", "two"))
    moved = torch.cat([(one[name] - start[name]).flatten().float() for name in start])
    apart = torch.cat([(one[name] - two[name]).flatten().float() for name in start])
    assert apart.norm() < 0.1 * moved.norm()


def test_a_finished_run_and_one_of_other_options_are_not_continued(capsys):
    run("--output", "out")
    assert "holds a finished run" in error_of(capsys, "--output", "out")
    Path("out/finished").unlink()
    message = error_of(capsys, "--output", "out", "--model.lr", "1")
    assert "other options (lr: 0.0003 there, 1.0 now)" in message and "--config out/config.yaml" in message


def test_data_that_changed_is_not_continued(capsys, museum):
    run("--output", "out")
    Path("out/finished").unlink()
    file = museum / "ground_truth" / "valset.json"
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    assert "its data changed" in error_of(capsys, "--output", "out", "--trainer.max_epochs", "2")


def test_descriptors_half_removed_by_a_kill():
    run("--output", "out", "--data.pairing", "syn+neg", "--trainer.max_epochs", "1")
    for file in ("finished", "descriptors/manifest.json", "descriptors/val.npy"):
        (Path("out") / file).unlink()
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    config["trainer"]["max_epochs"] = 2  # so that there is an epoch left to describe and train
    Path("out/config.yaml").write_text(yaml.safe_dump(config))
    run("--output", "out", "--data.pairing", "syn+neg")
    assert checkpoint("out/last.ckpt")["epoch"] == 1


def test_a_truncated_checkpoint_of_the_run(capsys):
    run("--output", "out")
    Path("out/finished").unlink()
    content = Path("out/last.ckpt").read_bytes()
    Path("out/last.ckpt").write_bytes(content[: len(content) // 2])
    message = error_of(capsys, "--output", "out")
    assert "out/last.ckpt: cannot be read" in message and "delete out" in message


def test_a_run_whose_folder_was_renamed_keeps_its_best(monkeypatch):
    """The last epoch must not replace a better one because the run has moved."""
    epochs = iter([0.9, 0.1])
    validated = lambda module: module.log("val/gap", next(epochs))  # noqa: E731
    monkeypatch.setattr(FineTuning, "on_validation_epoch_end", validated)
    options = ["--validate_first", "false", *NTXENT]
    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "on_train_epoch_start", stop_in_the_second_epoch)
        with pytest.raises(SystemExit):
            run("--output", "before", *options)
    Path("before").rename("after")
    run("--output", "after", *options)
    assert checkpoint("after/last.ckpt")["epoch"] == 1
    assert checkpoint("after/best.ckpt")["epoch"] == 0


def test_a_first_attempt_that_failed_does_not_block_its_folder(capsys, museum):
    assert "root nowhere: no such folder" in error_of(capsys, "--output", "out", "--data.root", "nowhere")
    run("--output", "out", "--trainer.max_epochs", "1")
    assert yaml.safe_load(Path("out/config.yaml").read_text())["data"]["root"] == str(museum.name)
    printed = capsys.readouterr().out
    assert "8 images of 6 exhibits" in printed


def test_an_interrupted_dated_run_says_how_to_continue(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "on_train_epoch_start", stop_in_the_second_epoch)
        message = error_of(capsys)
    [folder] = Path("runs").glob("*_train")
    assert f"finished epochs are kept, the same command with --output {folder} continues" in message
    run("--output", folder)
    assert checkpoint(folder / "last.ckpt")["epoch"] == 1


def stop_in_the_second_epoch(module: FineTuning) -> None:
    if module.current_epoch == 1:
        raise KeyboardInterrupt


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """The second checkpoint passes the limit on a file's size, as it would pass the disk's end."""
    limit = 5_000_000
    code = (
        "import sys; from metilr.models import checkpoints; import errno\n"
        "write = checkpoints.torch.save; n = [0]\n"
        "def save(content, stream):\n"
        "    n[0] += 1\n"
        "    if n[0] > 2:\n"
        f"        import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "    write(content, stream)\n"
        "checkpoints.torch.save = save\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from metilr.cli import run_main; run_main('metilr.training.cli:train', sys.argv[1:], prog='train.py')\n"
    )
    arguments = command("--output", "out", "--data.pairing", "syn+neg")[2:]
    run_ = subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run_.returncode == 2, run_.stderr[-2000:]
    [line] = [line for line in run_.stderr.splitlines() if "error" in line]
    assert ".ckpt: cannot be written" in line and "previous checkpoint is intact" in line
    assert checkpoint("out/last.ckpt")["epoch"] == 0
    assert not list(Path("out").glob(".*ckpt*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_half_precision_needs_a_gpu(capsys):
    assert "needs an NVIDIA GPU" in error_of(capsys, "--trainer.precision", "16-mixed")


def test_no_val_no_training(capsys, museum):
    (museum / "ground_truth" / "valset.json").unlink()
    assert "valset.json: no such file" in error_of(capsys)


def test_one_class_has_no_negatives(capsys, museum):
    entries = [{"id": 9, "path": f"MET/9/{i}.jpg"} for i in (2, 3)]
    write_ground_truth(museum, entries, [{"path": "test_met/val0.jpg", "MET_id": 9}], None)
    assert "at least two exhibits" in error_of(capsys, "--data.pairing", "syn+neg")


def test_a_corrupt_image_stops_all_processes_or_is_left_out(museum):
    (museum / "images" / "MET/41/4.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    options = ["--data.pairing", "syn+neg", "--trainer.devices", "2", "--output", "out"]
    failed = subprocess.run(command(*options), env=environment(), capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "MET/41/4.jpg: cannot be decoded" in failed.stderr
    assert "Traceback" not in failed.stderr
    run("--data.pairing", "syn+neg", "--data.bad_images", "skip", "--output", "skipping")
    assert len(column("skipping", "train/loss")) == 2 * 4  # 14 pairs


def test_the_fast_path_of_a_frozen_backbone_gives_the_plain_result():
    options = [
        "--model.freeze_backbone", "true", "--model.projector_dim", "4", "--data.n_views", "3",
        "--data.pairing", "syn+neg",
        "--model.lr", "1e-3", *CONTRASTIVE,
    ]  # fmt: skip
    run("--output", "plain", *options)
    run("--output", "fast", *options, "--data.cache_views", "true")
    assert column("fast", "train/loss") == pytest.approx(column("plain", "train/loss"), abs=1e-5)
    plain, fast = (checkpoint(f"{name}/last.ckpt")["state_dict"] for name in ("plain", "fast"))
    for name in ("embedder.projector.linear.weight", "embedder.projector.linear.bias"):
        torch.testing.assert_close(fast[name], plain[name], atol=1e-4, rtol=1e-3)


def test_caching_needs_a_frozen_backbone_and_a_number_of_views(capsys):
    assert "--data.cache_views true: needs n_views" in error_of(capsys, "--data.cache_views", "true")
    message = error_of(capsys, "--data.cache_views", "true", "--data.n_views", "2")
    assert "--data.cache_views true: needs a frozen backbone; give freeze_backbone true" in message


def test_mixed_precision_accumulation_and_checkpointing():
    run(
        "--output", "out", "--trainer.precision", "bf16-mixed", "--trainer.accumulate_grad_batches", "2",
        "--model.gradient_checkpointing", "true",
    )  # fmt: skip
    assert len(column("out", "train/loss")) == 2  # 2 epochs of 2 batches, logged at each step of the optimizer


def test_gradient_checkpointing_changes_no_gradient():
    options = ["--trainer.max_epochs", "1", "--model.warmup_steps", "0"]
    run("--output", "plain", *options)
    run("--output", "saving", *options, "--model.gradient_checkpointing", "true")
    assert FineTuning("r18_in", "random", gradient_checkpointing=True).embedder.backbone.model.grad_checkpointing
    plain, saving = (checkpoint(f"{name}/last.ckpt")["state_dict"] for name in ("plain", "saving"))
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_arcface_and_its_classes(capsys):
    loss = ["--model.loss", "pytorch_metric_learning.losses.ArcFaceLoss", "--model.loss.embedding_size", "512"]
    run("--output", "out", *loss, "--model.loss.num_classes", "6")
    assert "loss.W" in checkpoint("out/last.ckpt")["state_dict"]
    assert "num_classes" in error_of(capsys, *loss, "--model.loss.num_classes", "3")
    proxies = ["--model.loss", "pytorch_metric_learning.losses.ProxyAnchorLoss", "--model.loss.num_classes", "6"]
    assert "embeddings of size 512" in error_of(capsys, *proxies, "--model.loss.embedding_size", "64")


def test_wandb_offline_logs_curves_config_and_pictures(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(Path.cwd()))  # no netrc
    options = ["--data.pairing", "syn+neg", "--output", "out"]
    arguments = [o for o in command(*options) if o not in ("--wandb", "off")]
    subprocess.run(arguments, env={**environment(), "HOME": str(Path.cwd())}, check=True, capture_output=True)
    [folder] = Path("out/wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert list(folder.rglob("pairs*.table.json"))
    staged = [file for file in Path("out/wandb/artifacts").rglob("*") if file.is_file()]
    assert sum(file.read_bytes().startswith(b"\x89PNG") for file in staged) >= 2 * 8


CONFIGS = sorted((REPOSITORY / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_every_config_trains(config):
    small = [
        "--data.root", "museum", "--model.backbone", "r18_in", "--model.weights", "random", "--data.num_workers", "0",
        "--data.first_view.size", "40", "--data.second_view.size", "40", "--trainer.max_epochs", "1", "--wandb", "off",
        "--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "1", "--data.batch_pairs", "4",
    ]  # fmt: skip
    small += ["--model.projector_dim", "4"] if config.stem == "projector_only" else []
    run_main("metilr.training.cli:train", ["--config", str(config), *small, "--output", "out"], prog="train.py")
    assert Path("out/best.ckpt").exists()


def test_without_options_is_the_demo_config(capsys):
    def resolved(*options: str) -> dict:
        with pytest.raises(SystemExit):
            run_main("metilr.training.cli:train", [*options, "--print_config"], prog="train.py")
        return yaml.safe_load(capsys.readouterr().out)

    assert resolved("--config", str(REPOSITORY / "configs" / "train" / "demo.yaml")) == resolved()
