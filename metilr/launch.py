"""Which process this is: the only one, or one of several that torchrun or SLURM started."""

import os
from typing import Any

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_utilities.core import rank_zero


def has_launcher() -> bool:
    """Whether a launcher has started one process per device already."""
    return bool(TorchElasticEnvironment.detect() or SLURMEnvironment.detect())


def launched_as_first() -> bool:
    """Whether this process speaks for all: true unless a launcher started it as another than the first."""
    if TorchElasticEnvironment.detect():
        return os.environ["RANK"] == "0"
    return not SLURMEnvironment.detect() or os.environ["SLURM_PROCID"] == "0"


def is_first_process() -> bool:
    """Whether this process speaks for all, those that Lightning itself starts included."""
    only: Any = rank_zero.rank_zero_only
    return int(getattr(only, "rank", 0) or 0) == 0
