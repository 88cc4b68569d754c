"""The extraction loop: what batch size 1 gives, for any batching, number of processes and interruptions."""

import multiprocessing
import pickle
import re
import signal
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.strategies import DDPStrategy
from rich.console import Console

from metilr.data import views as images
from metilr.data.decode import load_image
from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.data.views import CentreCrops, SimulatedVisits
from metilr.demo import MuseumSize, make_demo
from metilr.errors import UserError
from metilr.extraction.datamodule import copy_beside
from metilr.extraction.describe import describe_images
from metilr.extraction.descriptors import open_descriptors, views_store
from metilr.extraction.module import DescriptorWriter, HostCopy
from metilr.extraction.options import ExtractionOptions
from metilr.extraction.store import SPLITS, DescriptorStore
from metilr.models.backbone import Features, build_backbone
from metilr.models.embedder import Embedder
from metilr.models.pooling import Pooling
from tests.forks import Outcome

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = MuseumSize(exhibits=10, mini_exhibits=8, val=(4, 3, 2), test=(4, 3, 2), longest_side=72)
ON_CPU = ExtractionOptions(accelerator="cpu", num_workers=0, batch_size=4)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("extraction") / "museum", size=SIZE, progress=False)


@pytest.fixture
def museum(drawn, tmp_path) -> GroundTruth:
    """A copy whose images a test may damage."""
    subprocess.run(["cp", "-r", drawn, tmp_path / "museum"], check=True)
    return load_ground_truth(tmp_path / "museum")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(build_backbone("timm/test_resnet", "random"), Pooling("gem")).eval()


def describe(embedder, museum, path, options=ON_CPU, views=()) -> DescriptorStore:
    return describe_images(embedder, museum, path, options, Console(quiet=True), views)


def one_by_one(embedder, museum, split) -> np.ndarray:
    rows = []
    for path in museum.paths[split]:
        with Image.open(museum.root / "images" / path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            rows.append(embedder.describe((pixels - 0.5) / 0.5)[0].numpy())
    return np.stack(rows)


# In a process that computes nothing before it forks; its arguments lie in a file.
DESCRIBES_BY_FORKS = """
import os, pickle, sys
from tests.extraction.test_extraction import describe
from tests.forks import spawn_by_forks
from tests.test_launch import state_of_process

spawn_by_forks()
os.environ.pop("OMP_NUM_THREADS")  # then Lightning sets it, and the number of threads
with open("arguments", "rb") as stream:
    arguments = pickle.load(stream)
before = state_of_process()
describe(*arguments)
assert state_of_process() == before
sys.exit(0)
"""


@pytest.fixture
def by_forks(forks, tmp_path):
    """Describes as ``describe`` does, with forks in place of spawned processes; its end and the store."""

    def by_forks(embedder, museum, path, options, views=()) -> tuple[Outcome, DescriptorStore]:
        folder = tmp_path / "by_forks"
        folder.mkdir()
        (folder / "arguments").write_bytes(pickle.dumps((embedder, museum, path, options, views)))
        return forks.run(folder, [], DESCRIBES_BY_FORKS), DescriptorStore(path)

    return by_forks


def n_made(store: DescriptorStore) -> int:
    return sum(int(store.is_valid(split).sum()) for split in SPLITS)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_rows_are_those_of_batch_size_1_in_ground_truth_order(embedder, museum, tmp_path, batch_size):
    options = ExtractionOptions(accelerator="cpu", num_workers=2, batch_size=batch_size)
    store = describe(embedder, museum, tmp_path / "store", options)
    for split in SPLITS:
        np.testing.assert_allclose(store.descriptors(split), one_by_one(embedder, museum, split), atol=1e-5)


def test_decoding_processes_change_no_byte_and_threads_no_more_than_rounding(embedder, museum, tmp_path):
    plain = describe(embedder, museum, tmp_path / "plain")
    workers = describe(
        embedder, museum, tmp_path / "workers", ExtractionOptions(accelerator="cpu", num_workers=2, batch_size=4)
    )
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if n_threads == 1 else 1)
        threads = describe(embedder, museum, tmp_path / "threads")
    finally:
        torch.set_num_threads(n_threads)
    for split in SPLITS:
        np.testing.assert_array_equal(workers.descriptors(split), plain.descriptors(split))
        np.testing.assert_allclose(threads.descriptors(split), plain.descriptors(split), atol=1e-5)


def test_two_processes_give_the_rows_of_one_and_each_view_is_described_as_alone(embedder, museum, tmp_path, by_forks):
    kinds = [SimulatedVisits(4, seed=3), CentreCrops((0.8, 0.5))]
    one = describe(embedder, museum, tmp_path / "one", views=kinds)
    options = ExtractionOptions(accelerator="cpu", devices=2, num_workers=0, batch_size=32)
    ended, two = by_forks(embedder, museum, tmp_path / "two", options, kinds)
    assert ended.status == 0, ended.printed
    for split in SPLITS:
        np.testing.assert_allclose(two.descriptors(split), one.descriptors(split), atol=1e-5)
        assert two.is_valid(split).all()
    for view in kinds:
        (views, settings), (by_two, _) = views_store(one, view), views_store(two, view)
        assert views.path.parent == one.path and views.path.name == by_two.path.name
        assert views.manifest().settings == settings and settings["view"] == view.settings()
        for split, source in view.of.items():
            with torch.inference_mode():
                expected = [
                    embedder.describe(embedder.normalise(view(load_image(museum.image(path)), path, number)[None]))[0]
                    for path in museum.paths[source]
                    for number in range(view.n)
                ]
            np.testing.assert_allclose(views.descriptors(split), torch.stack(expected).numpy(), atol=1e-5)
            np.testing.assert_allclose(by_two.descriptors(split), views.descriptors(split), atol=1e-5)


def test_openvino_s_engine_is_made_once_for_images_and_views_and_not_kept(embedder, museum, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="needs metilr[openvino]")
    from metilr.models.engines import OpenVINOEngine

    made, start = [], OpenVINOEngine.__init__
    monkeypatch.setattr(
        OpenVINOEngine, "__init__", lambda *of: (made.append((of[2], weakref.ref(of[0]))), start(*of))[1]
    )
    kinds, options = [SimulatedVisits(1, seed=3)], replace(ON_CPU, engine="openvino")
    store = describe(embedder, museum, tmp_path / "store", options, kinds)
    assert [precision for precision, _ in made] == ["32"] and made[0][1]() is None
    describe(embedder, museum, tmp_path / "store", options, [*kinds, CentreCrops((0.8,))])
    assert [precision for precision, _ in made] == ["32"] * 2 and made[1][1]() is None
    np.testing.assert_allclose(store.descriptors("val"), one_by_one(embedder, museum, "val"), atol=1e-5)


def test_a_bad_image_has_no_views(embedder, museum, tmp_path):
    museum.image(museum.paths["database"][3]).write_bytes(b"not an image")
    skip = ExtractionOptions(accelerator="cpu", num_workers=0, bad_images="skip")
    view = SimulatedVisits(3)
    store = describe(embedder, museum, tmp_path / "store", skip, [view])
    views, _ = views_store(store, view)
    assert np.flatnonzero(~views.is_valid("visits")).tolist() == [9, 10, 11]
    opened = open_descriptors([store.path], museum, [view])
    assert np.flatnonzero(~opened.is_valid["database"]).tolist() == [3]
    with pytest.raises(UserError, match="holds no descriptors of 4 simulated visits an image"):
        open_descriptors([store.path], museum, [SimulatedVisits(4)])


def test_a_bad_image_ends_two_processes_with_one_line(embedder, museum, tmp_path, by_forks):
    path = museum.image(museum.paths["val"][1])
    path.write_bytes(path.read_bytes()[:-200])
    options = ExtractionOptions(accelerator="cpu", devices=2, num_workers=0, batch_size=4)
    ended, _ = by_forks(embedder, museum, tmp_path / "store", options)
    line = ended.printed.splitlines()[-1]
    assert line.startswith("metilr.errors.UserError: ") and str(path) in line and "bad_images skip" in line


def test_an_extraction_says_where_its_time_went_and_a_second_one_describes_nothing(embedder, museum, tmp_path, capsys):
    options = ExtractionOptions(accelerator="cpu", num_workers=0, quiet=True, profile=True)
    describe(embedder, museum, tmp_path / "store", options)
    seconds = dict(re.findall(r"^ *([a-z]+) +(\d+\.\d+) ", capsys.readouterr().out, flags=re.MULTILINE))
    assert list(seconds) == ["decoding", "transfer", "network", "waiting", "writing"]
    assert float(seconds["network"]) > 0  # decoding a few tiny images can round to 0
    describe(embedder, museum, tmp_path / "store", options)
    assert not capsys.readouterr().out


def test_an_interrupted_run_continues_where_it_stopped(embedder, museum, tmp_path, monkeypatch):
    whole = describe(embedder, museum, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            describe(embedder, museum, tmp_path / "store")
    made = n_made(DescriptorStore(tmp_path / "store"))
    assert 0 < made < n_made(whole)

    decoded = []
    load_image = images.load_image
    monkeypatch.setattr(images, "load_image", lambda *args: decoded.append(args) or load_image(*args))
    continued = describe(embedder, museum, tmp_path / "store")
    assert len(decoded) == n_made(whole) - made
    for split in SPLITS:
        np.testing.assert_array_equal(continued.descriptors(split), whole.descriptors(split))


def interrupt_after(batches: int, patch: pytest.MonkeyPatch) -> None:
    write = DescriptorWriter.write_on_batch_end
    written = []

    def write_then_interrupt(self, *args, **kwargs):
        write(self, *args, **kwargs)
        written.append(1)
        if len(written) == batches:
            raise KeyboardInterrupt

    patch.setattr(DescriptorWriter, "write_on_batch_end", write_then_interrupt)


SIGNALS_ITSELF = """
import os, signal, sys
from metilr.extraction.module import DescriptorWriter

signal.signal(signal.SIGINT, signal.default_int_handler)  # who is run in the background is handed down an ignored one
own, leave = os.getpid(), os._exit
# End as a process of its own does; those that decode for it end as ever.
os._exit = lambda status: sys.exit(status) if os.getpid() == own else leave(status)
write = DescriptorWriter.write_on_batch_end
written = []

def write_then_signal(self, *args, **kwargs):
    write(self, *args, **kwargs)
    written.append(1)
    if len(written) == 3:
        os.kill(os.getpid(), {number})

DescriptorWriter.write_on_batch_end = write_then_signal
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_command_continues_to_the_same_bytes(embedder, museum, tmp_path, forks, number):
    command = [
        *("evaluate", "--root", museum.root, "--backbone", "timm/test_resnet", "--weights", "random"),
        *("--accelerator", "cpu", "--batch_size", 4, "--num_workers", 1, "--store", tmp_path / "store"),
    ]
    ended = forks.run(tmp_path / "run", command, SIGNALS_ITSELF.format(number=int(number)))
    assert ended.status == 130 and "Traceback" not in ended.printed, ended.printed
    assert "interrupted; finished work is kept" in ended.printed.splitlines()[-1]
    killed = DescriptorStore(tmp_path / "store")
    assert 0 < n_made(killed) < sum(len(paths) for paths in museum.paths.values())

    whole = describe(embedder, museum, tmp_path / "whole", ExtractionOptions(accelerator="cpu", batch_size=4))
    continued = describe(embedder, museum, tmp_path / "store", ExtractionOptions(accelerator="cpu", batch_size=4))
    for split in SPLITS:
        np.testing.assert_array_equal(continued.descriptors(split), whole.descriptors(split))


SLOW_SECOND_PROCESS = """
import os, time
from metilr.extraction.module import DescriptorWriter

write = DescriptorWriter.write_on_batch_end

def write_late(self, *args, **kwargs):
    time.sleep(0.1 * int(os.environ["RANK"]))
    write(self, *args, **kwargs)

DescriptorWriter.write_on_batch_end = write_late
"""

# What torchrun does, with forks in place of new processes, which would take seconds to import.
AS_TORCHRUN = """
import os, sys
from lightning_utilities.core import rank_zero
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from metilr.cli import run_command
{setup}
def command(options):
    rank_zero.rank_zero_only.rank = int(os.environ["RANK"])  # Lightning has read it before the fork
    run_command("metilr.commands.evaluate:evaluate", options, prog="evaluate.py")

one_machine = dict(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
elastic_launch(LaunchConfig(**one_machine, start_method="fork", monitor_interval=0.05), command)({options})
sys.exit()
"""


def test_torchrun_gives_one_result_and_the_rows_of_one_process(embedder, museum, tmp_path, forks):
    options = [
        *("--root", str(museum.root), "--backbone", "timm/test_resnet", "--weights", "random", "--accelerator", "cpu"),
        *("--devices", "2", "--num_workers", "0", "--store", str(tmp_path / "store")),
    ]
    launch = AS_TORCHRUN.format(setup=SLOW_SECOND_PROCESS, options=options)
    run = forks.run(tmp_path / "run", ["evaluate"], launch)
    assert run.status == 0, run.printed  # the first process waited for the other's rows
    assert len(list((tmp_path / "run/runs").glob("20*/results.json"))) == 1
    assert len(list((tmp_path / "run/runs").glob("20*"))) == 1
    command = ["evaluate", *options, "--whitening", "learned", "--visits", "1"]
    for each in forks.start_as_torchrun(tmp_path / "again", command):
        again = forks.wait(each)
        assert again.status == 0, again.printed  # the images are there, their visits are shared out
    assert len(list((tmp_path / "again/runs").glob("20*/results.json"))) == 1
    one = describe(embedder, museum, tmp_path / "one")
    for split in SPLITS:
        np.testing.assert_allclose(
            DescriptorStore(tmp_path / "store").descriptors(split), one.descriptors(split), atol=1e-5
        )


def test_a_truncated_image_stops_the_run_and_loses_nothing(embedder, museum, tmp_path, monkeypatch):
    path = museum.image(museum.paths["test"][2])
    intact = path.read_bytes()
    path.write_bytes(intact[:-200])
    with pytest.raises(UserError, match="cannot be decoded") as error:
        describe(embedder, museum, tmp_path / "store")
    assert str(path) in str(error.value)

    path.write_bytes(intact)
    made = n_made(DescriptorStore(tmp_path / "store"))
    decoded = []
    load_image = images.load_image
    monkeypatch.setattr(images, "load_image", lambda *args: decoded.append(args) or load_image(*args))
    store = describe(embedder, museum, tmp_path / "store")
    assert len(decoded) == n_made(store) - made


def test_skipped_images_are_left_out_and_a_mended_one_is_described(embedder, museum, tmp_path):
    truncated, not_an_image = museum.image(museum.paths["database"][3]), museum.image(museum.paths["val"][0])
    intact = truncated.read_bytes()
    truncated.write_bytes(intact[:-200])  # found while decoding
    not_an_image.write_bytes(b"not an image")  # found in the header
    museum.image(museum.paths["test"][1]).unlink()
    skip = ExtractionOptions(accelerator="cpu", num_workers=0, bad_images="skip")
    store = describe(embedder, museum, tmp_path / "store", skip)
    left_out = {(split, int(i)) for split in SPLITS for i in np.flatnonzero(~store.is_valid(split))}
    assert left_out == {("database", 3), ("val", 0), ("test", 1)}

    truncated.write_bytes(intact)
    assert describe(embedder, museum, tmp_path / "store", skip).is_valid("database").all()
    with pytest.raises(UserError, match="missing or empty"):
        describe(embedder, museum, tmp_path / "store")


def test_an_exchanged_image_alone_is_described_anew_also_by_two_processes(embedder, museum, tmp_path, monkeypatch):
    """Here these begin as spawned ones do, with nothing but what they are handed."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["metilr.extraction.describe"])
    monkeypatch.setattr(
        "metilr.extraction.describe.DDPStrategy",
        lambda **options: DDPStrategy(**{**options, "start_method": "forkserver"}),
    )
    before = np.array(describe(embedder, museum, tmp_path / "store").descriptors("database"))
    path = museum.image(museum.paths["database"][5])
    Image.effect_noise((72, 60), 80).convert("RGB").save(path)
    options = ExtractionOptions(accelerator="cpu", devices=2, num_workers=0, batch_size=4)
    after = describe(embedder, museum, tmp_path / "store", options).descriptors("database")
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [5]
    np.testing.assert_allclose(after, one_by_one(embedder, museum, "database"), atol=1e-5)


def test_other_settings_make_another_store(embedder, museum, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = ExtractionOptions(accelerator="cpu", num_workers=0, image_size=48)
    first, second = describe(embedder, museum, None), describe(embedder, museum, None, smaller)
    assert first.path != second.path
    assert describe(embedder, museum, None).path == first.path
    with pytest.raises(UserError, match="image_size: null there, 48 now"):
        describe(embedder, museum, first.path, smaller)
    square = replace(smaller, image_shape="square")
    with pytest.raises(UserError, match=r"image_size: 48 there, \[48, 48\] now"):
        describe(embedder, museum, second.path, square)
    assert describe(embedder, museum, None, square).path not in (first.path, second.path)


def test_square_rows_are_those_of_pictures_that_pillow_made_square(embedder, museum, tmp_path):
    """And crops of a query are cut from its square."""
    square = replace(ON_CPU, image_size=64, image_shape="square")
    store = describe(embedder, museum, tmp_path / "store", square, [CentreCrops((0.5,))])
    crops, _ = views_store(store, CentreCrops((0.5,)))
    for split in SPLITS:
        for row, path in enumerate(museum.paths[split]):
            with Image.open(museum.root / "images" / path) as image:
                picture = image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
            pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
            with torch.no_grad():
                whole, middle = embedder.describe(pixels)[0], embedder.describe(pixels[..., 16:48, 16:48])[0]
            np.testing.assert_allclose(store.descriptors(split)[row], whole, atol=1e-5)
            if split != "database":
                np.testing.assert_allclose(crops.descriptors(f"{split}_crops")[row], middle, atol=1e-5)


def test_a_square_has_a_side():
    with pytest.raises(UserError, match=r"^image_shape square: needs image_size"):
        ExtractionOptions(image_shape="square")
    assert ON_CPU.resize_to is None and replace(ON_CPU, image_size=48).resize_to == 48
    assert ON_CPU.resized_to((48, 48)) == replace(ON_CPU, image_size=48, image_shape="square")
    assert replace(ON_CPU, image_size=48, image_shape="square").resized_to(None) == ON_CPU


def test_a_descriptor_that_is_not_finite_stops_the_run_and_names_the_image(museum, tmp_path):
    broken = Embedder(build_backbone("timm/test_resnet", "random"), Pooling("gem")).eval()
    with torch.no_grad():
        next(broken.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"\.jpg: its descriptor is not finite"):
        describe(broken, museum, tmp_path / "store")
    assert n_made(DescriptorStore(tmp_path / "store")) == 0


@pytest.fixture
def particular() -> Embedder:
    """A model with a smallest size: sides of 64 px at the usual scales."""
    return Embedder(build_backbone("timm/convnext_atto", "random"), Pooling("gem")).eval()


SKIP = ExtractionOptions(accelerator="cpu", num_workers=0, batch_size=4, bad_images="skip", image_size=72)


def stretched(museum, split, i, size) -> Path:
    """Give an image another width and height."""
    file = museum.image(museum.paths[split][i])
    with Image.open(file) as image:
        resized = image.convert("RGB").resize(size)
    resized.save(file)
    return file


def left_out(store) -> set[tuple[str, int]]:
    return {(split, int(i)) for split in SPLITS for i in np.flatnonzero(~store.is_valid(split))}


def test_an_image_that_is_too_small_for_the_model_is_a_bad_one_and_found_before_any_is_described(
    particular, museum, tmp_path
):
    for split, paths in museum.paths.items():
        for i in range(len(paths)):
            stretched(museum, split, i, (72, 64))
    file = stretched(museum, "database", 5, (72, 63))
    with pytest.raises(
        UserError, match=r"\(63x72 px is too small for timm/convnext_atto: .* 64 px .*\); take a"
    ) as error:
        describe(particular, museum, tmp_path / "stopped")
    assert str(error.value).startswith(f"{file}: cannot be described")
    assert n_made(DescriptorStore(tmp_path / "stopped")) == 0
    store = describe(particular, museum, tmp_path / "store", SKIP)
    assert left_out(store) == {("database", 5)}
    described = [row for row in range(len(museum.paths["database"])) if row != 5]
    np.testing.assert_array_equal(np.linalg.norm(store.descriptors("database")[described], axis=1).round(5), 1)


def test_a_view_that_is_too_small_is_bad_too(particular, museum, tmp_path):
    for split, paths in museum.paths.items():
        for i in range(len(paths)):
            stretched(museum, split, i, (72, 64))
    stretched(museum, "val", 0, (72, 72))
    crops = CentreCrops((64 / 72,))
    sized = ExtractionOptions(accelerator="cpu", num_workers=0, image_size=72)
    with pytest.raises(UserError, match=r": a view \(centre crops\) of it cannot be described \(57x64 px is too small"):
        describe(particular, museum, tmp_path / "stopped", sized, [crops])
    store = describe(particular, museum, tmp_path / "store", SKIP, [crops])
    assert left_out(store) == set()
    assert views_store(store, crops)[0].is_valid("val_crops").tolist() == [True, *[False] * 8]


@pytest.mark.parametrize("n_streams", [1, 2])
def test_a_size_that_the_network_fails_for_makes_its_images_bad_and_no_others(
    embedder, museum, tmp_path, monkeypatch, n_streams
):
    monkeypatch.setattr(ExtractionOptions, "n_streams", n_streams)
    odd = stretched(museum, "val", 2, (41, 50))
    stretched(museum, "test", 3, (41, 50))
    compute = embedder.backbone.model.forward_features

    def fail_at_41(images):
        if images.shape[3] == 41:
            raise IndexError("index 41 is out of bounds")
        return compute(images)

    monkeypatch.setattr(type(embedder.backbone), "forward", lambda backbone, images: Features(fail_at_41(images), None))
    options = ExtractionOptions(accelerator="cpu", num_workers=0, batch_size=4)
    with pytest.raises(UserError, match=r"timm/test_resnet fails at 50x41 px, IndexError: index 41") as error:
        describe(embedder, museum, tmp_path / "stopped", options)
    assert str(error.value).startswith(f"{odd}: cannot be described")
    skip = ExtractionOptions(accelerator="cpu", num_workers=0, batch_size=4, bad_images="skip")
    store = describe(embedder, museum, tmp_path / "store", skip)
    assert left_out(store) == {("val", 2), ("test", 3)}


def test_an_image_size_that_is_too_small_is_refused_before_there_is_a_store(particular, museum, tmp_path):
    options = ExtractionOptions(accelerator="cpu", num_workers=0, image_size=40, bad_images="skip")
    with pytest.raises(
        UserError, match=r"^image_size 40: 40x40 px is too small for timm/convnext_atto: it needs sides"
    ):
        describe(particular, museum, tmp_path / "store", options)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "16-mixed", "accelerator": "cpu"}, "precision 16-mixed"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"devices": 0}, "devices 0"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"image_size": 10**9}, "image_size 1000000000: must be at most 16,384"),
        ({"batch_size": 10**9}, "batch_size 1000000000: must be at most 4,096"),
        ({"devices": 10**17, "accelerator": "cpu"}, "devices 100000000000000000: this machine has"),
        ({"num_workers": 10**6}, "num_workers 1000000: choose"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        ExtractionOptions(**options)


def test_memory_that_does_not_suffice_is_said_with_what_to_take_less_of(embedder, museum, tmp_path):
    huge = Embedder(embedder.backbone, embedder.pooling, None, (1.0,)).eval()
    huge.normalise = lambda images: torch.empty(2**45, dtype=torch.uint8)  # more than there are addresses for
    with pytest.raises(UserError, match=r"memory does not suffice .*: take a smaller batch_size or image_size, or"):
        describe(huge, museum, tmp_path / "store")
    assert n_made(DescriptorStore(tmp_path / "store")) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_no_silent_cpu():
    with pytest.raises(UserError, match="accelerator gpu"):
        ExtractionOptions(accelerator="gpu")


def test_bfloat16_is_close_to_float32_and_kept_apart(embedder, museum, tmp_path):
    larger = {"accelerator": "cpu", "num_workers": 0, "image_size": 160}
    exact = describe(embedder, museum, tmp_path / "exact", ExtractionOptions(**larger))
    rounded = describe(embedder, museum, tmp_path / "rounded", ExtractionOptions(**larger, precision="bf16-mixed"))
    cosines = (exact.descriptors("database") * rounded.descriptors("database")).sum(axis=1)
    assert cosines.min() > 0.99 and (exact.descriptors("database") != rounded.descriptors("database")).any()
    with pytest.raises(UserError, match="precision"):
        describe(embedder, museum, tmp_path / "exact", ExtractionOptions(**larger, precision="bf16-mixed"))


def test_small_images_are_spared_the_unreliable_bfloat16_of_the_cpu(embedder, museum, tmp_path):
    exact = describe(embedder, museum, tmp_path / "exact")
    options = ExtractionOptions(accelerator="cpu", num_workers=0, batch_size=4, precision="bf16-mixed")
    rounded = describe(embedder, museum, tmp_path / "rounded", options)
    for split in SPLITS:  # at 72 px a map gets 1 px wide, where bfloat16 gave random rows
        np.testing.assert_array_equal(rounded.descriptors(split), exact.descriptors(split))


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("engine", ["torch", "compile"])
def test_the_gpu_gives_the_rows_of_the_cpu(engine, embedder, museum, tmp_path):
    cpu = describe(embedder, museum, tmp_path / "cpu")
    options = ExtractionOptions(accelerator="gpu", devices=1, engine=engine, batch_size=2)  # many batches in flight
    gpu = describe(embedder, museum, tmp_path / "gpu", options)
    for split in SPLITS:
        np.testing.assert_allclose(gpu.descriptors(split), cpu.descriptors(split), atol=1e-5)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_on_a_gpu_is_close_to_float32(precision, embedder, museum, tmp_path):
    cpu = describe(embedder, museum, tmp_path / "cpu")
    gpu = describe(embedder, museum, tmp_path / "gpu", ExtractionOptions(accelerator="gpu", precision=precision))
    for split in SPLITS:
        assert (cpu.descriptors(split) * gpu.descriptors(split)).sum(axis=1).min() > 0.99


@pytest.mark.gpu
@GPU
def test_what_is_on_its_way_arrives_whole():
    device, rng = torch.device("cuda", 0), torch.Generator().manual_seed(0)
    images = [torch.randint(256, (8, 3, 500, 500), dtype=torch.uint8, generator=rng).pin_memory() for _ in range(20)]
    side, work = torch.cuda.Stream(device), torch.randn(4096, 4096, device=device)
    arrived = []
    for batch in images:
        on_gpu = copy_beside(batch, side)
        for _ in range(20):  # so that each copy is begun while the batch before is computed
            work = (work @ work).clamp(-1, 1)
        arrived.append(HostCopy(on_gpu.double().sum(dim=(1, 2, 3))))
        del on_gpu
    for batch, sums in zip(images, arrived, strict=True):
        assert torch.equal(sums.result(), batch.double().sum(dim=(1, 2, 3))) and sums.done()
