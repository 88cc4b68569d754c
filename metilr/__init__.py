"""Instance-level recognition of artworks: which exhibit a photo shows, and how sure that is.

What a researcher uses is here, imported when it is first named, so that ``import metilr`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from metilr.collection import PhotoOptions as PhotoOptions
    from metilr.collection.collection import Answer as Answer, Collection as Collection
    from metilr.collection.identify import identify as identify
    from metilr.collection.index import index as index
    from metilr.collection.open_collection import open_collection as open_collection
    from metilr.commands.audit import audit as audit
    from metilr.commands.evaluate import evaluate as evaluate
    from metilr.commands.export import export as export
    from metilr.data.ground_truth import GroundTruth as GroundTruth, load_ground_truth as load_ground_truth
    from metilr.errors import UserError as UserError
    from metilr.evaluation.options import (
        ComparisonOptions as ComparisonOptions,
        MethodOptions as MethodOptions,
        ReportOptions as ReportOptions,
    )
    from metilr.evaluation.read_run import Run as Run, load_run as load_run
    from metilr.evaluation.results import Results as Results
    from metilr.extraction.describe import describe_images as describe_images
    from metilr.extraction.options import ExtractionOptions as ExtractionOptions
    from metilr.extraction.store import DescriptorStore as DescriptorStore
    from metilr.metrics.functional import (
        DISTRACTOR as DISTRACTOR,
        acc as acc,
        gap as gap,
        gap_minus as gap_minus,
        mean_average_precision as mean_average_precision,
        recall_at as recall_at,
    )
    from metilr.metrics.torchmetrics import ACC as ACC, GAP as GAP, GAPMinus as GAPMinus
    from metilr.models import ModelOptions as ModelOptions
    from metilr.models.checkpoints import load as load, load_embedder as load_embedder
    from metilr.models.embedder import Embedder as Embedder, build_embedder as build_embedder
    from metilr.retrieval.knn import Predictions as Predictions, classify as classify, tune as tune
    from metilr.retrieval.search import Neighbours as Neighbours, class_ranks as class_ranks, search as search
    from metilr.retrieval.whitening import PCAWhitening as PCAWhitening, fit_pca_whitening as fit_pca_whitening
    from metilr.training import FineTuningOptions as FineTuningOptions, PairOptions as PairOptions
    from metilr.training.datamodule import FolderData as FolderData, PairDataModule as PairDataModule
    from metilr.training.module import FineTuning as FineTuning


_HOMES = {
    "collection": ("PhotoOptions",),
    "collection.collection": ("Answer", "Collection"),
    "collection.identify": ("identify",),
    "collection.index": ("index",),
    "collection.open_collection": ("open_collection",),
    "commands.audit": ("audit",),
    "commands.evaluate": ("evaluate",),
    "commands.export": ("export",),
    "data.ground_truth": ("GroundTruth", "load_ground_truth"),
    "errors": ("UserError",),
    "evaluation.options": ("ComparisonOptions", "MethodOptions", "ReportOptions"),
    "evaluation.read_run": ("Run", "load_run"),
    "evaluation.results": ("Results",),
    "extraction.describe": ("describe_images",),
    "extraction.options": ("ExtractionOptions",),
    "extraction.store": ("DescriptorStore",),
    "metrics.functional": ("DISTRACTOR", "acc", "gap", "gap_minus", "mean_average_precision", "recall_at"),
    "metrics.torchmetrics": ("ACC", "GAP", "GAPMinus"),
    "models": ("ModelOptions",),
    "models.checkpoints": ("load", "load_embedder"),
    "models.embedder": ("Embedder", "build_embedder"),
    "retrieval.knn": ("Predictions", "classify", "tune"),
    "retrieval.search": ("Neighbours", "class_ranks", "search"),
    "retrieval.whitening": ("PCAWhitening", "fit_pca_whitening"),
    "training": ("FineTuningOptions", "PairOptions"),
    "training.datamodule": ("FolderData", "PairDataModule"),
    "training.module": ("FineTuning",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'metilr' has no attribute {name!r}")
    return getattr(import_module(f"metilr.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
