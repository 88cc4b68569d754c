import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from metilr.errors import UserError
from metilr.metrics import ACC, DISTRACTOR, GAP, GAPMinus, acc, gap, gap_minus

N = 30


def answers():
    """Log-confidences with ties that float32 would add to: index order and float64 both matter."""
    rng = np.random.default_rng(0)
    log_confidence = torch.tensor(-1 - 1e-10 * rng.integers(0, 12, N), dtype=torch.float64)
    return log_confidence, torch.tensor(rng.integers(0, 2, N)), torch.tensor(rng.integers(-1, 2, N))


def expected():
    return {
        "GAP": gap(*answers()),
        "GAPMinus": gap_minus(*answers()),
        "ACC": acc(*answers()),
    }


def update(metric, index):
    index = torch.as_tensor(index)
    metric.update(*(values[index] for values in answers()), index)


def collection():
    return MetricCollection([GAP(), GAPMinus(), ACC()])


def as_floats(values):
    return {name: value.item() for name, value in values.items()}


def test_data_can_tell_orders_apart():
    log_confidence, predicted, target = answers()
    assert len({round(value, 12) for value in expected().values()}) == 3
    assert gap(log_confidence.flip(0), predicted.flip(0), target.flip(0)) != expected()["GAP"]
    assert gap(log_confidence.float(), predicted, target) != expected()["GAP"]


def test_batches_in_any_order_and_repeats_give_the_pure_value():
    metrics = collection()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for batch in [*order.split(7), order[:4], order[:1]]:
        update(metrics, batch)
    values = metrics.compute()
    assert as_floats(values) == expected()
    assert all(value.dtype == torch.float64 for value in values.values())
    assert len(metrics.compute_groups) == 1


def test_forward_gives_the_batch_value_and_keeps_the_rest():
    metric = GAP()
    log_confidence, predicted, target = answers()
    values = [
        metric(log_confidence[i : i + 10], predicted[i : i + 10], target[i : i + 10], torch.arange(i, i + 10))
        for i in range(0, N, 10)
    ]
    assert values[1].item() == gap(log_confidence[10:20], predicted[10:20], target[10:20])
    assert metric.compute().item() == expected()["GAP"]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric_class", [GAP, GAPMinus, ACC])
def test_without_met_queries_there_is_no_value(metric_class):
    metric = metric_class()
    assert metric.compute().isnan()
    metric.update(torch.zeros(2), torch.zeros(2), torch.full((2,), DISTRACTOR), torch.arange(2))
    assert metric.compute().isnan()


def test_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"index \(3,\)"):
        GAP().update(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3))


def run_process(rank, world_size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    results = {}

    # As a DistributedSampler deals: in turns, padded with queries of the other process. Uneven batches.
    shards = [[0, *range(0, N, 2)], [*range(1, N, 2), 0, 2]]
    for name, metrics in {"collection": collection(), "alone": MetricCollection([GAP()])}.items():
        for batch in torch.tensor(shards[rank]).split(4 + rank):
            update(metrics, batch)
        results[name] = as_floats(metrics.compute())
        metrics.reset()
        update(metrics, shards[rank])
        results[f"{name}, second epoch"] = as_floats(metrics.compute())

    # The second process has no query.
    for name, metrics in {"one empty": collection(), "one empty, alone": MetricCollection([GAP()])}.items():
        if rank == 0:
            update(metrics, range(10))
            update(metrics, range(10, N))
        results[name] = as_floats(metrics.compute())

    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_value_of_one(tmp_path):
    torch.multiprocessing.start_processes(run_process, (2, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert len(results) == 6
        for name, values in results.items():
            assert values == {metric: expected()[metric] for metric in values}, f"{name}, process {rank}"


def test_lightning_logs_the_value_of_the_whole_split(tmp_path):
    class Validated(pl.LightningModule):
        """Logs the metric objects, as a training module does."""

        def __init__(self):
            super().__init__()
            self.metrics = collection()
            self.gap = GAP()

        def validation_step(self, batch, batch_idx):
            *answer, index = batch
            self.metrics.update(*answer, index)
            self.gap(*answer, index)
            self.log_dict(dict(self.metrics.items()))
            self.log("gap", self.gap, on_step=False, on_epoch=True, sync_dist=True)

    loader = DataLoader(TensorDataset(*answers(), torch.arange(N)), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    (logged,) = trainer.validate(Validated(), loader, verbose=False)
    assert logged == pytest.approx({**expected(), "gap": expected()["GAP"]}, abs=1e-7)


@pytest.mark.parametrize("call", [lambda metric, *of: metric.update(*of), GAP.__call__], ids=["update", "forward"])
def test_all_answers_at_once_need_no_positions(call):
    """In their order, which decides between equal confidences."""
    metric, (log_confidence, predicted, target) = GAP(), answers()
    call(metric, log_confidence, predicted, target)
    assert metric.compute().item() == expected()["GAP"]
    metric.reset()
    backwards = [values.flip(0) for values in (log_confidence, predicted, target)]
    call(metric, *backwards)
    assert metric.compute().item() == gap(*backwards) != expected()["GAP"]


@pytest.mark.parametrize("call", [lambda metric, *of: metric.update(*of), GAP.__call__], ids=["update", "forward"])
@pytest.mark.parametrize("given", [True, False])
def test_several_batches_without_positions_are_refused(call, given):
    metric = GAP()
    batches = [[values[part] for values in answers()] for part in (slice(0, 20), slice(20, N))]
    call(metric, *batches[0])
    call(metric, *batches[1], *([torch.arange(20, N)] if given else []))
    with pytest.raises(UserError, match=r"index None: .* several batches or processes; give each batch its queries'"):
        metric.compute()


def test_two_processes_without_positions_are_refused():
    """As torchmetrics joins what two processes have: end to end."""
    first, second = GAP(), GAP()
    first.update(*(values[:15] for values in answers()))
    second.update(*(values[15:] for values in answers()))
    first.merge_state(second)
    with pytest.raises(UserError, match="index None"):
        first.compute()
