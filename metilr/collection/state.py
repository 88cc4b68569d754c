"""Whether a finished index is what the same command would make now."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from metilr.collection.index_schema import Index
from metilr.collection.labels import Labels
from metilr.data.decode import file_size
from metilr.evaluation.runs import refuse_other_options
from metilr.extraction.store import DescriptorStore
from metilr.files import file_sha256
from metilr.models import RANDOM, ModelOptions, is_on_hub
from metilr.sources.catalogue import Catalogue
from metilr.sources.fetch import DownloadOptions

NO_DIFFERENCE = {  # options that another time may be others
    "accelerator", "devices", "num_nodes", "batch_size", "num_workers", "quiet", "profile", "language", "relearn",
    "milvus",
    *(field.name for field in fields(DownloadOptions)),
}  # fmt: skip


def read_before(output: Path, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Index | None:
    """What a finished index says; UserError if it was made with other options than these.

    ``defaults`` are those of options that an index may be too old to have.
    """
    if not (output / "index.json").exists():
        return None
    before = Index.load(output)
    defaults = {**defaults, "model_files": options["model_files"]} if before.options else {}
    recorded = {"source" if name == "folder" else name: value for name, value in before.options.items()}
    was, now = ({name: value for name, value in each.items() if name not in NO_DIFFERENCE}
                for each in ({**defaults, **recorded}, options))  # fmt: skip
    refuse_other_options(output, was, now)
    return before


def is_current(
    output: Path, before: Index | None, catalogue: Catalogue, strangers: Catalogue | None, milvus: str | None
) -> bool:
    """Whether an index is of just these images and what is said of them, undamaged, and in Milvus if it is to be."""
    if before is None or not (labels := output / before.labels).exists():
        return False
    if labels.read_bytes() != Labels.content(catalogue):
        return False
    is_same = _is_of(output / before.store, before.catalogue, catalogue) and _has_visits(output, before)
    if is_same and milvus is not None:
        from metilr.collection.searchable import is_in_milvus  # faiss: indexes in memory do without

        is_same = is_in_milvus(output, before, milvus)
    if before.background is None or before.strangers is None or strangers is None:  # all, as the options are the same
        return is_same
    return is_same and _is_of(output / before.background.store, before.strangers, strangers)


def _is_of(store: Path, before: Catalogue, now: Catalogue) -> bool:
    if (before.paths, before.exhibits, before.sha256) != (now.paths, now.exhibits, now.sha256):
        return False
    sizes = np.array([file_size(now.folder / path) or 0 for path in now.paths], np.int64)
    return not DescriptorStore(store).pending("database", sizes, retry_bad=False).any()


def _has_visits(output: Path, before: Index) -> bool:
    """Whether the visits that are searched are there, as this version simulates them."""
    if before.method.database_views == "none":
        return True
    from metilr.evaluation.database import views_of
    from metilr.extraction.descriptors import views_store

    store, views = DescriptorStore(output / before.store), views_of(before.method, before.elements.seed)
    return all(views_store(store, view)[0].exists for view in views if "visits" in view.of)


def digests_of(model: ModelOptions) -> list[str]:
    """Of the files that make the model: others at the same place make other descriptors, which do not go together."""
    files = [Path(each) for each in (model.ckpt, model.weights) if each not in (None, RANDOM) and not is_on_hub(each)]
    return [file_sha256(file) for file in files if file.is_file()]
