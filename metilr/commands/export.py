"""``metilr export``: a model in one file for programs without PyTorch, with an index's descriptors beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.markup import escape

from metilr import __version__
from metilr.collection import index_file
from metilr.data.exhibit import Exhibit
from metilr.data.pixels import ImageSize
from metilr.errors import UserError, amount
from metilr.extraction.options import ImageShape, size_of
from metilr.files import file_sha256, replaced_file
from metilr.models import ModelOptions
from metilr.models.zoo import BACKBONES
from metilr.progress import make_console

if TYPE_CHECKING:
    from metilr.collection.collection import Collection
    from metilr.models.embedder import Embedder
    from metilr.retrieval.whitening import PCAWhitening


@dataclass(frozen=True)
class Exported:
    """What is written: a model with its whitening, and the index that it is of, if it is one's."""

    embedder: "Embedder"
    image_size: ImageSize | None
    whitening: "PCAWhitening | None"
    index: "Collection | None" = None


def export(
    model: str, output: Path, parts: ModelOptions | None = None, image_size: int | None = None,
    image_shape: ImageShape = "keep",
) -> None:  # fmt: skip
    """Write a model as one ONNX file, or an index's descriptors as a table.

    In an ONNX file are scales, pooling, projector and whitening: an image in, its descriptor out; metilr.onnx_embedder
    reads it without PyTorch. Of an index the descriptors are written, too, beside it: model.onnx, model.npz. This takes
    a minute or two. A Parquet file has a row for each row that is searched: path, exhibit, title and so on, vector.

    Args:
        model: Name of a backbone, file of a checkpoint, or folder that metilr index wrote.
        output: File to write, ending in .onnx, or, of an index, in .parquet.
        parts: Of a backbone; of a checkpoint the scales, of an index the place of the ckpt that made it.
        image_size: Longest side in px that photos are resized to; without it as the checkpoint was trained, else as
            they are. An index has its own.
        image_shape: Keep the ratio of a photo's sides, or make it square: the file then takes this size alone, as some
            networks need.
    """
    output, folder = Path(output), Path(model)
    is_table = output.suffix == ".parquet" and folder.is_dir()
    if output.suffix != ".onnx" and not is_table:
        raise UserError(f"{output}: name a file that ends in .onnx, or in .parquet of an index", "output")
    files = [output, output.with_suffix(".npz")][: 1 if is_table or not folder.is_dir() else 2]
    for file in files:
        if file.exists():
            raise UserError(f"{file}: is there already; name another file, or delete it", "output")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder; make it, or name another one", "output")
    size = size_of(image_size, image_shape)
    parts = ModelOptions() if parts is None else parts
    if is_table:
        n_rows = write_table(_of_index(folder, parts, size), output)
        make_console().print(f"wrote {escape(str(output))}: {amount(n_rows, 'row')}")
        return
    exported = _of_index(folder, parts, size) if folder.is_dir() else _of_model(model, parts, size)
    from metilr.models.onnx import export_onnx

    whitening = exported.whitening
    arrays = None if whitening is None else (whitening.mean, whitening.projection)
    notes = export_onnx(exported.embedder, output, exported.image_size, arrays)
    if (index := exported.index) is not None:  # what photos are compared with, as metilr.onnx_embedder reads it
        names = np.array([index.exhibits[label] for label in index.database.labels.tolist()])
        with replaced_file(output.with_suffix(".npz")) as stream:
            np.savez(stream, descriptors=index.database.rows, names=names, model=np.array(file_sha256(output)))
    written = " and ".join(escape(str(file)) for file in files)
    sides = f"{notes['least_side']} to {notes['most_side']:,} px"
    make_console().print(
        f"wrote {written}: {notes['model']['backbone']}, descriptors of width {notes['dim']}, of images with sides of "
        f"{sides}; licence of the weights: {notes['model']['provenance']['licence'] or 'unknown'}"
    )


def write_table(exported: Exported, output: Path) -> int:
    """Write an index as a Parquet file, a row for each that is searched; return how many.

    ``vector`` is float32 of unit length, as photos are compared with it; what made it stands in the file's metadata.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{output}: needs pyarrow: pip install 'metilr[parquet]'", "output") from None
    index = exported.index
    assert index is not None
    exhibits = [index.exhibits[label] for label in index.database.labels.tolist()]
    about = [index.about(exhibit) for exhibit in exhibits]
    parts = [name for name in Exhibit.model_fields if name != "more"]
    rows = np.ascontiguousarray(index.database.rows, np.float32)
    table = pyarrow.table({
        "path": [index.path(image) for image in index.database.images.tolist()],
        "exhibit": exhibits,
        **{part: pyarrow.array([getattr(each, part) for each in about], pyarrow.string()) for part in parts},
        "more": [json.dumps(each.more, ensure_ascii=False) for each in about],
        "vector": pyarrow.FixedSizeListArray.from_arrays(rows.reshape(-1), rows.shape[1]),
    })  # fmt: skip
    notes = {"metilr": __version__, "model": json.dumps(exported.embedder.describe_settings())}
    with replaced_file(output) as stream:
        parquet.write_table(table.replace_schema_metadata(notes), stream)
    return len(rows)


def _of_model(model: str, parts: ModelOptions, size: ImageSize | None) -> Exported:
    """A backbone by its name, or a checkpoint with the whitening that metilr pack put into it."""
    path, is_name = Path(model), model in BACKBONES or model.startswith("timm/")
    for name, default in (("ckpt", None), ("backbone", ModelOptions.backbone)):
        if getattr(parts, name) != default:
            raise UserError(f"{getattr(parts, name)}: is said by the model {model}; leave it out", name)
    if not is_name and not path.is_file():
        raise UserError(f"{model}: is no backbone's name, checkpoint or index", "model")
    options = replace(parts, backbone=model) if is_name else replace(parts, ckpt=path)
    from metilr.evaluation.database import load_whitening  # these take seconds
    from metilr.models.checkpoints import build_model, read_checkpoint

    whitening = None
    if not is_name:
        entry = read_checkpoint(path).get("metilr")
        is_packed = isinstance(entry, Mapping) and entry.get("whitening") is not None
        whitening = load_whitening(path) if is_packed else None
    embedder = build_model(options)
    return Exported(embedder, embedder.image_size if size is None else size, whitening)


def _of_index(folder: Path, parts: ModelOptions, size: ImageSize | None) -> Exported:
    """An index, if a photo's one float32 descriptor is what it compares."""
    index_file(folder)
    given = [field.name for field in fields(parts) if getattr(parts, field.name) != field.default]
    given = [*(name for name in given if name != "ckpt"), *(["image_size"] if size is not None else [])]
    if given:
        raise UserError(f"has no effect on the index {folder}, which carries its own; leave it out", given[0])
    from metilr.collection.open_collection import open_collection  # takes seconds

    index = open_collection(folder, parts.ckpt, accelerator="cpu")
    if index.method.query_crops:
        raise UserError(f"{folder}: compares crops of photos, too, which the file does not; index without query_crops")
    module = index.describer.module
    if module.precision != "32":
        raise UserError(f"{folder}: was described in {module.precision}, the file computes in float32; index in 32")
    return Exported(module.embedder, index.image_size, index.whitening, index)
