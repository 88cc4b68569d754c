"""``python train.py`` as a user runs it, on a tiny museum with a real (untrained) network."""

import contextlib
import csv
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Trainer

import metilr
from metilr.cli import run_main
from metilr.data.decode import load_image
from metilr.data.ground_truth import load_ground_truth
from metilr.data.visits import derive_seed
from metilr.errors import UserError
from metilr.evaluation.options import VISITS
from metilr.extraction.store import DescriptorStore
from metilr.models.checkpoints import load_class_weights
from metilr.models.embedder import build_embedder
from metilr.retrieval.whitening import fit_learned_whitening
from metilr.training import FineTuningOptions, PairOptions
from metilr.training.augmentations import RandomCrop, SimulatedVisit
from metilr.training.classifier import Classifier
from metilr.training.datamodule import PairDataModule
from metilr.training.module import P_BOUNDS, FineTuning
from tests.forks import Outcome
from tests.museum import write_ground_truth, write_museum
from tests.small_runs import evaluate

REPOSITORY = Path(__file__).resolve().parents[2]
NTXENT = ["--model.loss", "pytorch_metric_learning.losses.NTXentLoss", "--model.loss.temperature", "0.1"]
CONTRASTIVE = ["--model.loss", "metilr.training.losses.ContrastiveLoss"]
UNTRAINED = {"backbone": "timm/test_resnet", "weights": "random"}
TINY = [
    "--data.root", "museum", "--model.backbone", "timm/test_resnet", "--model.weights", "random",
    "--data.first_view", "RandomCrop", "--data.first_view.size", "40", "--data.second_view", "SimulatedVisit",
    "--data.second_view.size", "40", "--data.batch_pairs", "4", "--data.num_workers", "0",
    "--trainer.accelerator", "cpu", "--trainer.precision", "32", "--trainer.enable_progress_bar", "false",
    "--trainer.max_epochs", "2", "--wandb", "off",
]  # fmt: skip
TRAINED = ["--data.pairing", "syn+neg", "--model.lr", "1e-3", "--model.warmup_steps", "0", *CONTRASTIVE]
FROZEN = ["--model.freeze_backbone", "true", "--model.projector_dim", "4"]
SOME = ["--model.classes_per_step", 5, "--data.batch_pairs", 2]  # of 6 exhibits; a batch has 2 at most
SINGLE_SCALE = {"scales": [1], "k": 1, "tau": 1, "accelerator": "cpu", "num_workers": 0, "report": False}


@pytest.fixture(autouse=True)
def museum(tiny_museum, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # what runs leave behind goes there
    return tiny_museum


def run(*options: object) -> None:
    run_main("metilr.training.cli:train", [*TINY, *map(str, options)], prog="train.py")


@pytest.fixture
def run_apart(forks, museum):
    """Runs in a process of its own: several, which Lightning starts with the command line of the first, or W&B's.

    Those are forks of the first.
    """

    def run_apart(*options: object, setup: str = "") -> Outcome:
        command = [*TINY, *map(str, options)]
        argv = [str(REPOSITORY / "train.py"), *command]
        as_script = f"""
import subprocess, sys, __main__
from tests.forks import Script

sys.argv, __main__.__spec__, subprocess.Popen = {argv!r}, None, Script
"""
        return forks.run(Path.cwd(), ["train", *command], as_script + setup)

    return run_apart


@pytest.fixture
def run_as_two(forks, museum):
    """Runs in two processes as torchrun starts them; how both ended."""

    def run_as_two(*options: object) -> list[Outcome]:
        command = ["train", *TINY, *map(str, options), "--trainer.devices", 2]
        return [forks.wait(one) for one in forks.start_as_torchrun(Path.cwd(), command)]

    return run_as_two


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run, which had no test split to read."""
    folder = tmp_path_factory.mktemp("trained")
    museum = write_museum(folder / "museum")
    (museum / "ground_truth/testset.json").unlink()
    for file in museum.glob("images/*/test*"):
        file.unlink()
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        run("--output", "out", *TRAINED)
    (folder / "printed").write_text(printed.getvalue())
    return folder / "out"


@pytest.fixture
def unfinished(trained) -> None:
    """The same as if it had been killed at its end, in ``out``."""
    shutil.copytree(trained, "out")
    Path("out/finished").unlink()


def error_of(capsys, *options: object, status: int = 2) -> str:
    """The one line that a user's mistake ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == status
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("train.py: error: ")
    return line


def column(folder: str | Path, name: str) -> list[float]:
    with (Path(folder) / "csv/metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


def checkpoint(file: str | Path) -> dict:
    return torch.load(file, weights_only=True)


def changed(start: dict, end: dict) -> set[str]:
    return {name for name, tensor in start.items() if not torch.equal(tensor, end[name])}


def test_a_run_leaves_checkpoints_metrics_and_options(trained):
    assert {"best.ckpt", "last.ckpt", "config.yaml", "csv", "finished"} <= {file.name for file in trained.iterdir()}
    assert len(column(trained, "train/loss")) == 2 * 4  # 8 images, a positive and a negative each, in batches of 4
    assert len(column(trained, "val/gap")) == 1 + 2
    for name in ("train/positive_similarity", "train/negative_similarity", "train/active_hinges", "train/p", "val/acc"):
        assert column(trained, name), name
    entry = checkpoint(trained / "best.ckpt")["metilr"]
    assert entry["model"]["backbone"] == "timm/test_resnet" and entry["data"]["counts"]["database_images"] == 8
    assert entry["config"] == yaml.safe_load((trained / "config.yaml").read_text())
    printed = (trained.parent / "printed").read_text()
    assert "8 images of 6 exhibits" in printed and "epoch 2 of 2: loss " in printed and "v_num" not in printed
    assert "python evaluate.py --ckpt" in printed and "out/best.ckpt --root museum" in " ".join(printed.split())


def test_evaluation_of_the_checkpoint_gives_what_validation_logged(trained, museum):
    results = evaluate(museum, ckpt=trained / "last.ckpt", whitening="none", output=Path("results"), **SINGLE_SCALE)
    for name in ("gap", "gap_minus", "acc"):
        assert column(trained, f"val/{name}")[-1] == pytest.approx(getattr(results.val, name), abs=1e-6)


def test_batchnorm_statistics_stay_and_weights_move(trained):
    start, end = (
        FineTuning(FineTuningOptions(**UNTRAINED)).state_dict(),
        checkpoint(trained / "last.ckpt")["state_dict"],
    )
    stay = ("running_mean", "running_var", "num_batches_tracked", "embedder.mean", "embedder.std", "pooling.p")
    assert changed(start, end) == {name for name in start if not name.endswith(stay)}


def test_the_same_command_gives_the_same_weights_with_any_number_of_decoding_processes(trained):
    run("--output", "out", *TRAINED, "--data.num_workers", 2)
    assert not changed(*(checkpoint(folder / "last.ckpt")["state_dict"] for folder in (trained, Path("out"))))


def test_two_processes_give_the_losses_and_weights_of_one(run_apart):
    network = "timm/test_efficientnet"  # whose batch is computed in parts
    options = ["--data.pairing", "syn+real+neg", "--model.lr", "1e-4", "--model.warmup_steps", "0", *NTXENT]
    options += ["--model.backbone", network]
    run("--output", "one", *options)
    assert run_apart("--output", "two", *options, "--trainer.devices", 2).status == 0
    assert column("two", "train/loss") == pytest.approx(column("one", "train/loss"), abs=1e-4)
    start = FineTuning(FineTuningOptions(**UNTRAINED | {"backbone": network})).state_dict()
    one, two = (checkpoint(f"{name}/last.ckpt")["state_dict"] for name in ("one", "two"))
    moved = torch.cat([(one[name] - start[name]).flatten().float() for name in start])
    apart = torch.cat([(one[name] - two[name]).flatten().float() for name in start])
    assert apart.norm() < 0.1 * moved.norm()


def test_a_corrupt_image_stops_all_processes_or_is_left_out(museum, run_as_two):
    (museum / "images/MET/41/4.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    for failed in run_as_two("--data.pairing", "syn+neg", "--output", "out"):
        assert failed.status == 2 and "Traceback" not in failed.printed
        assert "MET/41/4.jpg: cannot be decoded" in failed.printed
    run("--data.pairing", "syn+neg", "--data.bad_images", "skip", "--output", "skipping")
    assert len(column("skipping", "train/loss")) == 2 * 4  # 14 pairs


def test_a_network_with_a_smallest_side_is_trained_without_what_is_too_small_for_it(museum):
    with Image.open(museum / "images/MET/41/4.jpg") as image:
        narrow = image.resize((60, 20))
    narrow.save(museum / "images/MET/41/4.jpg")
    particular = ["--model.backbone", "timm/inception_v3", "--data.image_size", 120, "--trainer.max_epochs", 1]
    views = ["--data.first_view.size", 75, "--data.second_view.size", 75]
    run(*particular, *views, "--data.pairing", "syn+neg", "--data.bad_images", "skip", "--output", "out")
    assert not DescriptorStore(Path("out/descriptors")).is_valid("database")[4]
    assert column("out", "val/gap")


def test_the_fast_path_of_a_frozen_backbone_gives_the_plain_result():
    options = [*FROZEN, "--data.n_views", "3", "--data.pairing", "syn+neg", "--model.lr", "1e-3", *CONTRASTIVE]
    run("--output", "plain", *options)
    run("--output", "fast", *options, "--data.cache_views", "true")
    assert column("fast", "train/loss") == pytest.approx(column("plain", "train/loss"), abs=1e-5)
    start = FineTuning(FineTuningOptions(**UNTRAINED, freeze_backbone=True, projector_dim=4)).state_dict()
    plain, fast = (checkpoint(f"{name}/last.ckpt")["state_dict"] for name in ("plain", "fast"))
    projector = {"embedder.projector.linear.weight", "embedder.projector.linear.bias"}
    assert changed(start, plain) == changed(start, fast) == projector
    for name in projector:
        torch.testing.assert_close(fast[name], plain[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["cosine", "arcface", "subcenter"])
def test_a_classifier_without_a_step_has_the_figures_of_prototypes(museum, kind):
    """Behind a projector that whitens; of one image or several an exhibit."""
    run("--output", "out", *FROZEN, "--model.classifier", kind, "--model.lr", "0", "--trainer.max_epochs", "1")
    evaluated = {"ckpt": Path("out/last.ckpt"), "whitening": "none", "store": Path("s"), **SINGLE_SCALE}
    prototypes, classifier = (
        evaluate(museum, database_rows=rows, output=Path(rows), **evaluated) for rows in ("prototypes", "classifier")
    )
    assert classifier.elements.database_rows == "classifier"
    for split in ("val", "test"):
        written = (Path(rows, f"predictions/{split}.csv").read_text() for rows in ("prototypes", "classifier"))
        for first, second in zip(*(csv.DictReader(io.StringIO(text)) for text in written), strict=True):
            assert first["predicted_id"] == second["predicted_id"] and first["nearest_path"] == second["nearest_path"]
            assert float(first["log_confidence"]) == pytest.approx(float(second["log_confidence"]), abs=1e-5)
        for name in ("gap", "gap_minus", "acc"):
            assert getattr(prototypes.splits[split], name) == getattr(classifier.splits[split], name)
    assert column("out", "val/gap")[0] == pytest.approx(prototypes.val.gap, abs=1e-6)


@pytest.mark.parametrize("options", [[], ["--model.classifier_start", "random"], ["--data.cache_views", "true"]])
def test_a_classifier_s_weights_alone_are_trained_behind_a_frozen_backbone(museum, options):
    """Its loss falls, and what validation logs is what an evaluation of its rows gives."""
    frozen = ["--model.freeze_backbone", "true", "--model.classifier", "cosine", "--data.n_views", "2", *options]
    options = [*frozen, "--model.lr_classifier", "0.05", "--trainer.max_epochs", "6", "--model.warmup_steps", "0"]
    run("--output", "out", *options)
    start = FineTuning(FineTuningOptions(**UNTRAINED)).state_dict()
    end = checkpoint("out/last.ckpt")["state_dict"]
    assert end.keys() - start.keys() == {"classifier.weight"} and len(end["classifier.weight"]) == 6
    assert not changed(start, end)
    losses = column("out", "train/epoch_loss")
    assert losses[-1] < 0.9 * losses[0]
    options = {"ckpt": Path("out/last.ckpt"), "whitening": "none", "database_rows": "classifier", **SINGLE_SCALE}
    results = evaluate(museum, output=Path("results"), **options)
    assert column("out", "val/gap")[-1] == pytest.approx(results.val.gap, abs=1e-6)


def test_an_exhibit_without_a_usable_image_is_not_among_the_class_weights(museum):
    (museum / "images/MET/12/6.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    run("--output", "out", *FROZEN, "--model.classifier", "subcenter", "--data.bad_images", "skip")
    assert np.unique(load_class_weights("out/last.ckpt").exhibit_ids).tolist() == [9, 33, 41, 70, 500]
    assert FineTuning.load_from_checkpoint("out/last.ckpt").exhibit_ids.tolist() == [9, 12, 33, 41, 70, 500]
    write_museum(museum)
    mended = {"ckpt": "out/last.ckpt", "database_rows": "classifier", "whitening": "none", "accelerator": "cpu"}
    with pytest.raises(UserError, match=r"does not know 1 exhibit of .*\(12\)"):
        evaluate(museum, num_workers=0, report=False, **mended)


@pytest.mark.parametrize(
    "more", [[], ["--model.contrastive_weight", 0.5, *NTXENT, *SOME], ["--model.classifier", "subcenter"]]
)
def test_a_classifier_is_resumed_and_loaded_with_its_weights(monkeypatch, more):
    options = ["--model.classifier", "arcface", "--model.lr", "1e-3", "--model.warmup_steps", "0", *FROZEN, *more]
    run("--output", "whole", *options)
    with monkeypatch.context() as patch:  # killed after its first epoch
        patch.setattr(FineTuning, "on_train_epoch_start", lambda self: 1 / (1 - self.current_epoch))
        with pytest.raises(ZeroDivisionError):
            run("--output", "again", *options)
    run("--output", "again", *options)
    whole, again = (checkpoint(f"{name}/last.ckpt")["state_dict"] for name in ("whole", "again"))
    assert whole.keys() == again.keys()
    for name in whole:
        torch.testing.assert_close(again[name], whole[name], atol=1e-6, rtol=0)
    loaded = FineTuning.load_from_checkpoint("whole/last.ckpt", lr=0.0, weight_decay=0.0)
    views = {"first_view": RandomCrop(40), "second_view": SimulatedVisit(40)}
    data = PairDataModule(PairOptions(Path("museum"), num_workers=0, batch_pairs=2, **views), 0, Path("data"))
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(loaded, datamodule=data)  # from these weights, not from prototypes anew
    assert torch.equal(loaded.classifier.weight, whole["classifier.weight"])
    assert loaded.exhibit_ids.tolist() == [9, 12, 33, 41, 70, 500]
    module = FineTuning(FineTuningOptions(**UNTRAINED, classifier="cosine"))
    with pytest.raises(UserError, match="classifier needs the exhibits of a PairDataModule"):
        Trainer(logger=False, accelerator="cpu").fit(module, [])


def test_each_batch_draws_classes_of_its_own(monkeypatch):
    """Those that a step of the optimizer accumulates, too; and what a batch would leave no class to draw is refused."""
    seeds, forward = set(), Classifier.forward

    def noted(self, embeddings, labels, seed):
        seeds.add(seed)
        return forward(self, embeddings, labels, seed)

    monkeypatch.setattr(Classifier, "forward", noted)
    options = ["--model.classifier", "cosine", *FROZEN, *SOME, "--trainer.accumulate_grad_batches", 2]
    run("--output", "out", *options)
    assert len(seeds) >= 2 * 4  # epochs, batches
    with pytest.raises(SystemExit):
        run("--output", "other", *options, "--data.batch_pairs", 3)


def test_a_classifier_behind_a_fine_tuned_backbone(trained):
    torch.save(metilr.load(trained / "best.ckpt").backbone.model.state_dict(), "network.pth")
    run("--output", "out", "--model.weights", "network.pth", *FROZEN, "--model.classifier", "cosine")
    before, after = (checkpoint(Path(folder, "best.ckpt"))["state_dict"] for folder in (trained, "out"))
    network = [name for name in before if name.startswith("embedder.backbone.")]
    assert network and all(torch.equal(before[name], after[name]) for name in network)


@pytest.mark.parametrize("more", [[], ["--model.contrastive_weight", 0.5], SOME], ids=["all", "both", "some"])
def test_two_processes_have_the_gradients_of_one(run_as_two, more):
    """Of class weights and projector, as the optimizer's mean of them is after an epoch that hardly moves either."""
    options = ["--model.classifier", "cosine", *FROZEN, "--model.lr", "1e-7", "--model.warmup_steps", "0"]
    options += ["--trainer.max_epochs", "1", "--data.batch_pairs", 8, *more]
    run("--output", "one", *options)
    assert [ended.status for ended in run_as_two("--output", "two", *options)] == [0, 0]
    of_one, of_two = (checkpoint(f"{name}/last.ckpt")["optimizer_states"][0]["state"] for name in ("one", "two"))
    assert len(of_one) == 3  # the projector's weight and bias, the class weights
    for name, state in of_one.items():
        assert state["exp_avg"].norm() > 1e-4
        torch.testing.assert_close(of_two[name]["exp_avg"], state["exp_avg"], atol=1e-6, rtol=1e-4)


def test_two_terms_add_up_and_are_logged():
    """On the starting weights, of which the first step's loss is: that of a classifier alone, and that of the loss."""
    options = ["--model.classifier", "cosine", *FROZEN, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    run("--output", "both", *options, "--model.contrastive_weight", 0.25, *NTXENT)
    run("--output", "classifier", *options)
    run("--output", "contrastive", *FROZEN, *options[-4:], *NTXENT)
    total, of_classes, of_pairs = (
        column("both", f"train/{name}") for name in ("loss", "classifier_loss", "contrastive_loss")
    )
    np.testing.assert_allclose(total, np.array(of_classes) + 0.25 * np.array(of_pairs), rtol=1e-6)
    assert of_classes[0] == pytest.approx(column("classifier", "train/loss")[0], rel=1e-6)
    assert of_pairs[0] == pytest.approx(column("contrastive", "train/loss")[0], rel=1e-6)


def prototypes_of_museum(folder: str) -> np.ndarray:
    """Of what a training has described, by a loop: a column an exhibit."""
    store = DescriptorStore(Path(folder, "descriptors"))
    labels = load_ground_truth(Path("museum")).labels["database"]
    means = [store.descriptors("database")[labels == label].mean(axis=0) for label in range(labels.max() + 1)]
    return np.stack([mean / np.linalg.norm(mean) for mean in means], axis=1)


def test_the_projector_starts_as_whitening(museum):
    run("--output", "out", *FROZEN, "--model.lr", "0", "--trainer.max_epochs", "1")
    ckpt = {"ckpt": Path("out/last.ckpt"), "whitening": "none", "store": Path("s")}
    projected = evaluate(museum, output=Path("a"), **ckpt, **SINGLE_SCALE)
    whitened = evaluate(museum, output=Path("b"), **UNTRAINED, whitening_dim=4, **SINGLE_SCALE)
    assert projected.val.gap == pytest.approx(whitened.val.gap, abs=1e-6)
    assert np.load("s/database.npy").shape == (8, 4)


def test_the_projector_starts_as_whitening_learned_from_simulated_visits():
    """Against the same whitening of images and visits described one by one."""
    learned = ["--model.projector_start", "learned", "--trainer.max_epochs", "1", "--model.lr", "0"]
    run("--output", "out", *FROZEN, *learned)
    truth = load_ground_truth(Path("museum"))
    paths, labels = truth.paths["database"], truth.labels["database"].tolist()
    plain, visit = build_embedder("timm/test_resnet", "random"), SimulatedVisit(40)

    def pooled(image: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return plain(plain.normalise(image[None]))[0].numpy()

    images = np.array([pooled(load_image(truth.image(path))) for path in paths])
    differences = [
        row - pooled(visit(load_image(truth.image(path)), derive_seed(0, path, number)))
        for row, path in zip(images, paths, strict=True)
        for number in range(VISITS)
    ]  # of those with two images both are a pair as well
    differences += [images[i] - images[j] for i, j in itertools.combinations(range(8), 2) if labels[i] == labels[j]]
    expected = fit_learned_whitening([images], [np.array(differences)], dim=4)
    start = checkpoint("out/last.ckpt")["state_dict"]
    weight, bias = (start[f"embedder.projector.linear.{name}"].numpy() for name in ("weight", "bias"))
    found, wanted = images @ weight.T + bias, (images - expected.mean) @ expected.projection
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())


def test_learned_p_stays_in_bounds_and_has_no_weight_decay():
    run("--output", "out", "--model.learn_p", "true", "--model.lr_p", "100", "--model.warmup_steps", "0")
    content = checkpoint("out/last.ckpt")
    assert P_BOUNDS[0] <= content["state_dict"]["embedder.pooling.p"].item() <= P_BOUNDS[1]
    groups = {group["name"]: group for group in content["optimizer_states"][0]["param_groups"]}
    assert groups["p"]["weight_decay"] == 0 and groups["backbone"]["weight_decay"] == 0.01


@pytest.mark.parametrize("loss", [CONTRASTIVE, NTXENT], ids=["contrastive", "ntxent"])
def test_four_pairs_are_overfitted(loss, museum):
    """Two exhibits, fixed views: positives come together, negatives apart."""
    database = json.loads((museum / "ground_truth/MET_database.json").read_text())
    two = [entry for entry in database if entry["id"] in (9, 41)][1:]
    write_ground_truth(museum, two, [{"path": "test_met/val0.jpg", "MET_id": 9}], None)
    run("--output", "out", "--data.n_views", "1", *TRAINED[:6], "--model.schedule", "constant", *loss,
        "--trainer.max_epochs", "25", "--validate_first", "false")  # fmt: skip
    losses = column("out", "train/loss")
    assert losses[-1] < 0.1 * losses[0]
    assert column("out", "train/positive_similarity")[-1] > column("out", "train/negative_similarity")[-1] + 0.5


def test_mixed_precision_and_accumulation():
    run("--output", "out", "--trainer.precision", "bf16-mixed", "--trainer.accumulate_grad_batches", "2")
    assert len(column("out", "train/loss")) == 2  # 2 epochs of 2 batches, logged at each step of the optimizer


@pytest.mark.parametrize(("has_it", "chosen"), [(True, "bf16-mixed"), (False, "32")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is the CPU that has it or not")
def test_the_precision_is_what_the_processor_computes_in(monkeypatch, capsys, has_it, chosen):
    monkeypatch.setattr("metilr.training.run.has_bfloat16", lambda: has_it)
    run("--output", "out", "--trainer.precision", "null", "--trainer.max_epochs", "1", "--validate_first", "false")
    assert str(yaml.safe_load(Path("out/config.yaml").read_text())["trainer"]["precision"]) == chosen
    assert ("does not compute in bfloat16" in capsys.readouterr().out) is not has_it


def test_gradient_checkpointing_changes_no_gradient(trained):
    run("--output", "out", *TRAINED, "--model.gradient_checkpointing", "true")
    assert FineTuning(
        FineTuningOptions(**UNTRAINED, gradient_checkpointing=True)
    ).embedder.backbone.model.grad_checkpointing
    assert not changed(*(checkpoint(folder / "last.ckpt")["state_dict"] for folder in (trained, Path("out"))))


def test_arcface_and_its_classes(capsys):
    loss = ["--model.loss", "pytorch_metric_learning.losses.ArcFaceLoss", "--model.loss.embedding_size"]
    dim = FineTuning(FineTuningOptions(**UNTRAINED)).embedder.dim
    run("--output", "out", *loss, dim, "--model.loss.num_classes", "6")
    assert "loss.W" in checkpoint("out/last.ckpt")["state_dict"]
    assert "num_classes" in error_of(capsys, *loss, dim, "--model.loss.num_classes", "3")
    assert f"embeddings of size {dim}" in error_of(capsys, *loss, dim + 1, "--model.loss.num_classes", "6")


@pytest.mark.parametrize(("backbone", "lr"), [("timm/test_resnet", "1e+10"), ("timm/tf_efficientnet_lite0", "1e+30")])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("batch_pairs", [4, 8])  # 8 are all: the epoch's only step is followed by validation
def test_weights_that_explode_are_told_by_their_step_and_no_image_is_blamed(
    capsys, precision, batch_pairs, backbone, lr
):
    wild = ["--model.lr", lr, "--model.warmup_steps", "0", "--trainer.precision", precision]
    wild += ["--model.backbone", backbone]
    message = error_of(capsys, "--output", "out", *wild, "--data.batch_pairs", batch_pairs)
    assert f"--model.lr {lr}: the " in message and "after step 1:" in message and ".jpg" not in message


def test_a_batch_without_a_negative_is_refused(capsys):
    single = ["--data.pairing", "syn", "--data.batch_pairs", "1"]
    assert "--data.batch_pairs 1: 8 pairs in 8 batches" in error_of(capsys, "--output", "out", *NTXENT, *single)
    three = ["--data.anchors_per_epoch", "3", "--data.pairing", "syn", "--data.batch_pairs", "2"]
    assert "has no negative" in error_of(capsys, "--output", "out", *NTXENT, *three)
    run("--output", "given", *CONTRASTIVE, *single, "--data.pairing", "syn+neg")  # the pairs themselves are negatives


def test_an_epoch_s_line_comes_when_its_checkpoint_is_on_the_disk(monkeypatch):
    said = []

    def note(line, **_):
        if line.startswith("epoch "):
            said.append((line.partition(":")[0], checkpoint("out/last.ckpt")["epoch"]))

    monkeypatch.setattr("metilr.training.callbacks.print_rank_zero", note)
    run("--output", "out", "--validate_first", "false")
    assert said == [("epoch 1 of 2", 0), ("epoch 2 of 2", 1)]


def test_a_finished_run_and_one_of_other_options_are_not_continued(capsys, unfinished):
    message = error_of(capsys, "--output", "out", *TRAINED, "--model.lr", "1")
    assert "other options (lr: 0.001 there, 1.0 now)" in message and "--config out/config.yaml" in message
    Path("out/finished").touch()
    Path("out/last.ckpt").unlink()  # somebody needed the space
    capsys.readouterr()
    run("--output", "out", *TRAINED)
    assert capsys.readouterr().out == "finished already: out\n"
    assert "finished, with other options (lr: 0.001 there" in error_of(
        capsys, "--output", "out", *TRAINED, "--model.lr", "1"
    )


def test_data_that_changed_is_not_continued(capsys, museum, unfinished):
    file = museum / "ground_truth/valset.json"
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    assert "holds a training on other data" in error_of(capsys, "--output", "out", *TRAINED)


def test_descriptors_half_removed_by_a_kill(unfinished):
    for file in ("manifest.json", "val.npy"):
        Path("out/descriptors", file).unlink()
    config = Path("out/config.yaml")
    config.write_text(config.read_text().replace("max_epochs: 2", "max_epochs: 3"))  # so that there is one to train
    run("--output", "out", *TRAINED, "--trainer.max_epochs", "3")
    assert checkpoint("out/last.ckpt")["epoch"] == 2


def test_a_truncated_checkpoint_of_the_run(capsys, unfinished):
    content = Path("out/last.ckpt").read_bytes()
    Path("out/last.ckpt").write_bytes(content[: len(content) // 2])
    message = error_of(capsys, "--output", "out", *TRAINED)
    assert "out/last.ckpt: cannot be read" in message


def test_an_interrupted_dated_run_goes_on_and_keeps_its_best_under_another_name(capsys, monkeypatch):
    """The last epoch must not replace a better one because the run has moved."""

    def stop_in_the_second_epoch(module: FineTuning) -> None:
        if module.current_epoch == 1:
            raise KeyboardInterrupt

    epochs = iter([0.9, 0.1])
    monkeypatch.setattr(FineTuning, "on_validation_epoch_end", lambda module: module.log("val/gap", next(epochs)))
    options = ["--validate_first", "false", *NTXENT]
    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "on_train_epoch_start", stop_in_the_second_epoch)
        message = error_of(capsys, *options, status=130)
    [folder] = Path("runs").glob("*_train")
    assert f"interrupted; with --output {folder} the command continues" in message
    folder.rename("after")
    run("--output", "after", *options)
    assert checkpoint("after/last.ckpt")["epoch"] == 1
    assert checkpoint("after/best.ckpt")["epoch"] == 0


def test_a_first_attempt_that_failed_does_not_block_its_folder(capsys):
    assert "--data.root nowhere: no such folder" in error_of(capsys, "--output", "out", "--data.root", "nowhere")
    run("--output", "out", "--trainer.max_epochs", "1")
    assert yaml.safe_load(Path("out/config.yaml").read_text())["data"]["root"] == "museum"


def test_wandb_offline_logs_curves_config_and_pictures(run_apart):
    without_account = """
import os
os.environ["HOME"] = os.getcwd()  # no netrc
for name in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)
"""
    assert run_apart(*TRAINED, "--output", "out", "--wandb", "auto", setup=without_account).status == 0
    [folder] = Path("out/wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb")) and list(folder.rglob("pairs*.table.json"))
    staged = [file for file in Path("out/wandb/artifacts").rglob("*") if file.is_file()]
    assert sum(file.read_bytes().startswith(b"\x89PNG") for file in staged) >= 2 * 8


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs/train").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_trains(config):
    small = ["--config", config, *TINY[:6], "--data.num_workers", "0", "--data.first_view.size", "40",
             "--data.second_view.size", "40", "--trainer.max_epochs", "1", "--wandb", "off", "--trainer.accelerator",
             "cpu", "--data.anchors_per_epoch", "4", "--data.batch_pairs", "4", "--output", "out"]  # fmt: skip
    small += ["--model.projector_dim", "4"] if "projector_dim" in config.read_text() else []
    run_main("metilr.training.cli:train", [*map(str, small)], prog="train.py")
    assert Path("out/best.ckpt").exists()


def test_without_options_is_the_demo_config(capsys):
    def resolved(*options: str) -> dict:
        with pytest.raises(SystemExit):
            run_main("metilr.training.cli:train", [*options, "--print_config"], prog="train.py")
        return yaml.safe_load(capsys.readouterr().out)

    assert resolved("--config", str(REPOSITORY / "configs/train/demo.yaml")) == resolved()


def test_no_option_at_all_begins_the_demo_s_training(monkeypatch):
    begun = []
    monkeypatch.setattr("metilr.training.run.run", lambda *given: begun.append(given[:3]))
    run_main("metilr.training.cli:train", [], prog="train.py")
    [(options, model, data)] = begun
    assert (options.output, model.backbone, model.weights, data.root) == (None, "lite0_in", None, None)


def test_lightning_loads_the_checkpoint_of_a_run(trained):
    loaded = FineTuning.load_from_checkpoint(str(trained / "last.ckpt"))
    assert not changed(checkpoint(trained / "last.ckpt")["state_dict"], loaded.state_dict())
    assert (loaded.options.lr, loaded.loss.margin) == (1e-3, 1.8)
    assert loaded.embedder.backbone.provenance.source == "checkpoint last.ckpt"
