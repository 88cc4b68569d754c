"""``metilr pack``: the model of an evaluation and the whitening that it learned, in one checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from metilr.errors import UserError
from metilr.evaluation.database import CHECKPOINTS
from metilr.evaluation.read_run import Run, read_run
from metilr.progress import make_console


def pack(run: Path, output: Path) -> None:
    """Write a run's model and whitening into one checkpoint, to pass on.

    To evaluate other data with it: metilr evaluate --ckpt FILE --whitening FILE. Class weights that were searched go
    along. Crops, visits in the database and a geometric check are no part of it: they stay options.

    Args:
        run: Folder that metilr evaluate wrote.
        output: File to write, ending in .ckpt or .safetensors.
    """
    output = Path(output)
    if output.suffix not in CHECKPOINTS:
        raise UserError(f"{output}: name a file that ends in {' or '.join(CHECKPOINTS)}", "output")
    if output.exists():
        raise UserError(f"{output}: is there already; name another file, or delete it", "output")
    content = packed(read_run(Path(run)))
    if not content["metilr"].keys() & {"whitening", "classifier"}:
        raise UserError(f"{run}: was evaluated without whitening; there is none to pack")
    from metilr.models.checkpoints import write_checkpoint

    write_checkpoint(output, content)
    name = escape(str(output))
    make_console().print(
        f"wrote {name}; now: metilr evaluate --ckpt {name}{options_with(content['metilr'], name)} --root DIR, with "
        "the run's options for crops, visits and geometry, if it had some"
    )


def options_with(entry: Mapping[str, Any], place: str) -> str:
    """The options that an evaluation with what a checkpoint holds needs besides --ckpt, which is ``place``."""
    whitening = f" --whitening {place if 'whitening' in entry else 'none'}"
    return whitening + (" --database_rows classifier" if "classifier" in entry else "")


def packed(run: Run) -> dict[str, Any]:
    """What a checkpoint of a run's model holds, with its whitening and class weights if it searched with them.

    UserError if it has no model.
    """
    import numpy as np  # these take seconds
    import torch

    from metilr.collection.open_collection import embedder_of_run, whitening_of_run
    from metilr.models.checkpoints import CLASS_WEIGHTS, EMBEDDER, FORMAT, load_class_weights, model_entry
    from metilr.retrieval.whitening import parts_of_whitening

    model, entry = run.results.model, dict[str, Any]()
    if run.config.get("descriptors") or model.store is None:
        raise UserError(f"{run.path}: was made from descriptors, so it has no model; evaluate from a root")
    if (whitening := whitening_of_run(run)) is not None:
        parts = {name: torch.from_numpy(np.array(part)) for name, part in parts_of_whitening(whitening).items()}
        entry = {"whitening": {"kind": whitening.format, **parts}}
    tensors = {}
    if run.results.classifier is not None:
        weights = load_class_weights(str(run.config["ckpt"]))
        if weights.sha256() != run.results.classifier.get("sha256"):
            raise UserError(f"{run.config['ckpt']}: its class weights are not those of the evaluation; evaluate again")
        tensors = {CLASS_WEIGHTS: torch.from_numpy(weights.rows)}
        entry["classifier"] = {"exhibit_ids": torch.from_numpy(weights.exhibit_ids)}
    embedder = embedder_of_run(run)
    provenance = embedder.backbone.provenance
    return {
        "state_dict": {f"{EMBEDDER}{name}": tensor for name, tensor in embedder.state_dict().items()} | tensors,
        "metilr": {
            "format": FORMAT,
            "model": model_entry(embedder, model.image_size),
            "provenance": {"source": provenance.source, "licence": provenance.licence},
            "data": run.results.data.model_dump(include={"root", "database", "counts", "fingerprint"}),
            "config": dict(run.config),
            **entry,
        },
    }
