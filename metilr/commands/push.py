"""``metilr push``: a run's model on the Hugging Face Hub, with a card that holds its figures."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from metilr import report
from metilr.cli import flat_defaults
from metilr.commands.evaluate import evaluate
from metilr.commands.pack import options_with, packed
from metilr.errors import UserError, one_line
from metilr.evaluation.read_run import Run, read_run
from metilr.evaluation.results import FIGURES, LEVEL
from metilr.evaluation.runs import plain_options
from metilr.progress import make_console, printable
from metilr.report.tables import METRICS, TextTable, calibrated, chosen, interval_in_words

FILE = "model.safetensors"
LEFT_OUT = ("store", "made_with", "views", "concatenated")  # of what results say of the model: places, and each session


def push(run: Path, repository: str, public: bool = False) -> str:
    """Publish a run's model on the Hugging Face Hub, with a card of its figures.

    Model and whitening go into one file that can hold no code, and the card (README.md) says what the figures are, of
    which split, with intervals, and how they were made. Of folders on this machine only names are told. To be used as
    --ckpt hf://OWNER/NAME. Needs a token that may write: hf auth login, or HF_TOKEN.

    Args:
        run: Folder that metilr evaluate wrote.
        repository: OWNER/NAME; made if there is none yet, else it gets a new commit.
        public: Whether all may see a repository that is made now; without it its owner alone.

    Returns:
        The address of what was published, with its commit.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository}: is no name of a repository; write OWNER/NAME", "repository")
    finished = read_run(Path(run))
    import huggingface_hub

    from metilr.models.checkpoints import write_checkpoint

    if huggingface_hub.get_token() is None:
        raise UserError(f"{repository}: no token; hf auth login, or set HF_TOKEN", "repository")
    content = _without_places(packed(finished))
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place, FILE), content)
        Path(place, "README.md").write_text(model_card(finished, repository, content["metilr"]), encoding="utf-8")
        try:
            api = huggingface_hub.HfApi(library_name="metilr")
            api.create_repo(repository, private=not public, exist_ok=True)
            what = f"Model of an evaluation on {finished.results.data.root}"
            commit = api.upload_folder(repo_id=repository, folder_path=place, commit_message=what).oid
        except Exception as error:  # each of its HTTP libraries has errors of its own
            remedy = "see whether the network and the name are right and the token may write; then run it again"
            raise UserError(f"{repository}: cannot be published ({one_line(error)}); {remedy}", "repository") from error
    address, place = f"hf://{repository}@{commit}/{FILE}", f"hf://{repository}"
    options = f"--ckpt {place}{options_with(content['metilr'], place)}"
    make_console().print(f"wrote {escape(address)}; now: metilr evaluate {options} --root DIR")
    return address


def model_card(run: Run, repository: str, entry: Mapping[str, Any]) -> str:
    """The README of a published model: figures of val and test, and what made them, also for programs.

    ``entry`` is what its checkpoint says of it, without places.
    """
    import jinja2

    results, model = run.results, run.results.model.recorded()
    options = plain_options(flat_defaults(evaluate))
    changed = {name: value for name, value in entry["config"].items() if value != options.get(name)}
    made = {
        "created": results.created,
        "data": results.data.recorded(),
        "model": {name: value for name, value in model.items() if name not in LEFT_OUT},
        "weights": entry["provenance"],
        "whitening": results.whitening,
        "knn": {"k": results.knn.k, "tau": results.knn.tau, "tuned_on": results.knn.tuned_on},
        "options": changed,  # other than the defaults
        "versions": results.versions,
        "machine": results.machine,
    }
    loader = jinja2.FileSystemLoader(Path(report.__file__).parent / "templates")
    return jinja2.Environment(loader=loader, keep_trailing_newline=True).get_template("card.md").render(
        metadata=_yaml(_metadata(run, repository, entry["provenance"]["licence"])),
        name=repository.partition("/")[2],
        results=results,
        table=_table(run).markdown(),
        made=_yaml(made),
        whitening="whitening" in entry,
        options=options_with(entry, f"hf://{repository}"),
        address=f"hf://{repository}",
    )  # fmt: skip


def _table(run: Run) -> TextTable:
    results, rows = run.results, []
    for split, figures in results.splits.items():
        ends = {} if results.unit is None else figures.intervals[results.unit]
        cells = [f"{100 * getattr(figures, metric):.2f}" for metric in FIGURES]
        for i, (low, high) in enumerate(ends[metric] for metric in FIGURES if ends):
            cells[i] += f" ({100 * low:.0f}–{100 * high:.0f})"
        rows.append([split, f"{figures.n_met:,} of {figures.n_queries:,}", *cells])
    notes = [f"in percent; {chosen(results.knn)}; test scored once", *results.notes]
    notes += [f"in brackets {100 * LEVEL:g}% intervals: {interval_in_words(results)}"] if results.unit else []
    notes += [] if results.confidence is None else [calibrated(results.confidence)]
    title = f"{results.data.root}, {results.data.database} database"
    return TextTable(title, [], ["split", "met of all", *METRICS.values()], rows, notes=notes)


def _metadata(run: Run, repository: str, licence: str | None) -> dict[str, Any]:
    """What the Hub reads of a card."""
    data, measured = run.results.data, []
    for split, figures in run.results.splits.items():
        values = [{"type": name, "name": METRICS[name], "value": getattr(figures, name)} for name in FIGURES]
        on = {"type": printable(data.root), "name": f"{printable(data.root)} ({data.database})", "split": split}
        task = {"type": "image-feature-extraction", "name": "instance-level recognition"}
        measured.append({"task": task, "dataset": on, "metrics": values})
    return {
        "library_name": "metilr",
        "pipeline_tag": "image-feature-extraction",
        **({} if licence is None else {"license": licence}),
        "tags": ["instance-level-recognition", "image-retrieval", "art"],
        "model-index": [{"name": repository.partition("/")[2], "results": measured}],
    }


def _without_places(part: Any) -> Any:
    """The same with names alone in place of paths, which would tell of somebody's disk."""
    if isinstance(part, Mapping):
        return {name: _without_places(value) for name, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [_without_places(value) for value in part]
    return Path(part).name if isinstance(part, str) and Path(part).is_absolute() else part


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
