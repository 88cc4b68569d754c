"""`FineTuning` as any LightningModule: in one's own trainer, with one's own loader, and from its checkpoint."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_metric_learning.losses import ArcFaceLoss, NTXentLoss, TripletMarginLoss
from torch.utils.data import DataLoader, TensorDataset

from metilr.errors import UserError
from metilr.models.checkpoints import load_embedder
from metilr.training import FineTuningOptions
from metilr.training.losses import ContrastiveLoss
from metilr.training.module import FineTuning

UNTRAINED = {"backbone": "timm/test_resnet", "weights": "random"}
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2,
}  # fmt: skip


def tuning(**options) -> FineTuning:
    return FineTuning(FineTuningOptions(**{**UNTRAINED, "warmup_steps": 0, **options}))


def loader(kind: str = "uint8", n_columns: int = 3, batch_size: int = 4) -> DataLoader:
    """Pairs of pictures with their exhibits, in the forms that people's datasets have."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(256, (8, 3, 40, 40), generator=generator, dtype=torch.uint8) for _ in range(2))
    if kind == "float":
        first, second = first / 255, second / 255
    columns = [first, second, torch.arange(8), torch.arange(8) // 2 * 2][:n_columns]
    return DataLoader(TensorDataset(*columns), batch_size=batch_size)


def fit(module: FineTuning, *loaders: DataLoader, folder=None, **how) -> pl.Trainer:
    trainer = pl.Trainer(**{**QUIET, "enable_checkpointing": folder is not None, "default_root_dir": folder, **how})
    trainer.fit(module, *loaders)
    return trainer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("n_columns", [3, 4])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_any_loader_of_image_pairs_and_labels_is_trained_on(schedule, n_columns):
    module = tuning(schedule=schedule)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = fit(module, loader(n_columns=n_columns))
    assert trainer.global_step == 4 and torch.isfinite(trainer.callback_metrics["train/loss"])
    assert any(not torch.equal(start[name], value) for name, value in module.state_dict().items())


def test_bytes_and_floats_up_to_one_are_the_same_images():
    losses = [fit(tuning(), loader(kind)).callback_metrics["train/loss"].item() for kind in ("uint8", "float")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_projector_comes_behind_the_layer_that_a_network_brings_along():
    embedder = tuning(backbone="r50_sscd", projector_dim=4).embedder
    assert embedder.describe(embedder.normalise(torch.rand(2, 3, 64, 64))).shape == (2, 4)


def test_pairs_of_two_exhibits_are_negatives():
    """Against the loss itself, of the embeddings before the step."""
    module = tuning(loss=ContrastiveLoss(1.0), schedule="constant")
    batch = next(iter(loader(n_columns=4, batch_size=8)))
    with torch.no_grad():
        first, second = (module.embed(images) for images in batch[:2])
    expected = ContrastiveLoss(1.0)(first, second, batch[2] == batch[3])
    trainer = fit(module, DataLoader([batch], batch_size=None), max_epochs=1)
    assert not (batch[2] == batch[3]).all()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_learning_rate_falls_to_nothing_over_a_loader_of_one_s_own():
    """As torch's cosine does, over 2 epochs of 2 batches."""
    seen = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(tuning(lr=1e-3), loader(), callbacks=[Rates()])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    expected = []
    for _ in range(4):
        optimizer.step()
        cosine.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx(expected, abs=1e-9)


def test_validation_on_one_s_own_pairs_is_their_loss():
    trainer = fit(tuning(lr=0.0), loader(batch_size=8), loader(batch_size=8), max_epochs=1)
    figures = trainer.callback_metrics
    assert figures["val/loss"].item() == pytest.approx(figures["train/loss"].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("batches", "options", "said"),
    [
        ([torch.zeros(4, 3, 40, 40)], {}, "a batch must be (first, second, labels)"),
        ([[torch.zeros(4, 3, 40, 40), torch.zeros(4, 3, 40, 40)]], {}, "a batch must be (first, second, labels)"),
        ([[torch.zeros(4, 3, 40, 40), torch.zeros(3, 3, 40, 40), torch.arange(4)]], {}, "of one length"),
        ([[torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 40), torch.arange(1)]], {}, "has no negative"),
        ([[torch.ones(4, 3, 40, 40) * 9, torch.zeros(4, 3, 40, 40), torch.arange(4)]], {}, "from 0 to 1"),
        (loader(), {"projector_dim": 4}, "projector_start pca: is learned on the images of a PairDataModule"),
        ((each for each in loader()), {}, "schedule cosine: needs to know how many steps"),
    ],
)  # fmt: skip
def test_what_it_needs_is_said_in_a_line(batches, options, said):
    batches = DataLoader(batches, batch_size=None) if isinstance(batches, list) else batches
    with pytest.raises(UserError) as caught:
        fit(tuning(**options), batches)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "loss",
    [None, NTXentLoss(temperature=0.1), ContrastiveLoss(0.7), TripletMarginLoss(margin=0.2)],
    ids=["none", "ntxent", "contrastive", "triplet"],
)
def test_a_checkpoint_is_loaded_with_weights_options_and_loss(folder, loss):
    module = tuning(loss=loss, projector_dim=5, projector_start="random", scales=(1.0, 0.5), lr=1e-3, learn_p=True)
    trainer = fit(module, loader(), folder=folder)
    given = {"loss": loss} if isinstance(loss, (NTXentLoss, TripletMarginLoss)) else {}
    loaded = FineTuning.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, **given)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    options = {**vars(module.options), "weights": "random", "loss": None}
    assert {**vars(loaded.options), "loss": None} == options and type(loaded.loss) is type(module.loss)
    assert getattr(loaded.loss, "margin", None) == getattr(module.loss, "margin", None)
    fit(loaded, loader())  # and goes on


def test_a_checkpoint_says_which_loss_it_was_trained_with(folder):
    loss = ArcFaceLoss(8, tuning().embedder.dim)
    trainer = fit(tuning(loss=loss), loader(), folder=folder)
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(UserError, match=r"was trained with ArcFaceLoss: give it, as load_from_checkpoint\(PATH, loss="):
        FineTuning.load_from_checkpoint(path)
    loaded = FineTuning.load_from_checkpoint(path, loss=ArcFaceLoss(8, tuning().embedder.dim), lr=0.5)
    assert torch.equal(loaded.loss.W, loss.W) and loaded.options.lr == 0.5


def test_evaluation_and_lightning_read_what_was_trained_without_a_data_module(folder):
    module = tuning()
    trainer = fit(module, loader(), folder=folder)
    path = trainer.checkpoint_callback.best_model_path
    images = next(iter(loader()))[0]
    with torch.no_grad():
        found = load_embedder(path)(load_embedder(path).normalise(images))
        torch.testing.assert_close(found, module.embed(images))
    again = tuning()
    pl.Trainer(**{**QUIET, "max_epochs": 3}, enable_checkpointing=False).fit(again, loader(), ckpt_path=path)
    assert again.current_epoch == 3


def test_what_is_no_checkpoint_of_a_training_is_refused(folder):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, folder / "other.ckpt")
    with pytest.raises(
        UserError, match=r"other\.ckpt: was not written by a training of metilr; open it with metilr\.load"
    ):
        FineTuning.load_from_checkpoint(folder / "other.ckpt")
    with pytest.raises(UserError, match=r"nowhere\.ckpt: no such file"):
        FineTuning.load_from_checkpoint("nowhere.ckpt")
