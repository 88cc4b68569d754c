"""Lightning's hints, kept out of the terminal where metilr has decided already; errors still come through."""

import logging
import warnings

LOGGERS = (
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.signal_connector",
)
HINTS = (
    ".*does not have many workers.*",
    ".*persistent_workers=True.*",  # there is one pass
    ".*infer the batch indices.*",  # batches carry their rows themselves
    ".*module\\(s\\) in eval mode at the start of training.*",  # as it should be
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*lr_scheduler.step.*",
    ".*does not have a `val_dataloader`.*|.*You defined a `validation_step`.*",
    ".*TensorFloat32.*",
    ".*sync_dist=True.*",  # the logged values are the same in all processes
    # Lightning's own calls.
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*instantiate_classes.*deprecated.*",
    ".*all_gather is deprecated.*",
)


def quieten_lightning() -> None:
    """Keep hints out of this process's terminal."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for hint in HINTS:
        warnings.filterwarnings("ignore", message=hint)
