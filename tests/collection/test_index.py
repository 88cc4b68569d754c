"""``metilr index``: from a plain folder to answers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metilr.cli import main
from metilr.collection import PhotoOptions
from metilr.collection.collection import load_photo
from metilr.collection.index import index as index_images
from metilr.collection.index_schema import Index
from metilr.collection.open_collection import open_with_threshold
from metilr.errors import UserError
from metilr.evaluation.options import MethodOptions
from metilr.retrieval.whitening import PCAWhitening
from tests.collection.conftest import AS_OPTIONS, INDEXED, write_images
from tests.hostile import NAME
from tests.small_runs import index


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images that a test may change."""
    return write_images(tmp_path)


def open_index(path: Path, threshold: float | None = None):
    return open_with_threshold(PhotoOptions(store=path, threshold=threshold, accelerator="cpu"))


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": None},
        {"whitening": "none", "scales": [1.0]},
        {"whitening": "learned", "visits": 2, "database_views": "rows", "query_crops": [0.5], "k": 8},
        {"image_shape": "square"},
    ],
    ids=["default", "unwhitened", "all elements", "square"],
)
def test_an_image_of_the_folder_is_identified_as_itself(folder, tmp_path, options):
    assert index(folder, tmp_path / "index", **INDEXED | options) == tmp_path / "index"
    collection, threshold = open_index(tmp_path / "index")
    assert (collection.k, collection.tau, len(collection.exhibits)) == (8, 50.0, 6)
    assert collection.image_size == ((40, 40) if "image_shape" in options else 500 if "image_size" in options else 40)
    for row in range(8):
        answer = collection.answer(load_photo(collection.image(row), collection.image_size).image)
        assert answer.matches[0].row == row and answer.matches[0].similarity == pytest.approx(1, abs=1e-4)
        assert answer.exhibit == collection.path(row).split("/")[0]
    assert threshold.decide(0.0) == "undecided" and "no val queries" in threshold.origin
    given = open_index(tmp_path / "index", threshold=-1.0)[1]
    assert (given.decide(-1.0), given.decide(-1.1)) == ("exhibit", "not in the collection")


def test_an_index_of_prototypes_has_one_row_an_exhibit(folder, tmp_path):
    options = {"database_rows": "prototypes", "whitening": "none"}
    index(folder, tmp_path / "index", **INDEXED | options)
    collection, _ = open_index(tmp_path / "index")
    assert (collection.k, len(collection.database.rows), len(collection.exhibits)) == (1, 6, 6)
    names = [collection.path(row).split("/")[0] for row in range(8)]
    single = [row for row in range(8) if names.count(names[row]) == 1]
    for row in single:  # the mean of one image
        answer = collection.answer(load_photo(collection.image(row), collection.image_size).image)
        assert (answer.exhibit, answer.matches[0].row) == (names[row], row)
        assert answer.similarity == pytest.approx(1, abs=1e-4)
    with pytest.raises(UserError, match="with other options"):
        index(folder, tmp_path / "index", **INDEXED)
    with pytest.raises(UserError, match="knows the numbers of an evaluation's exhibits"):
        index(folder, tmp_path / "other", **INDEXED | options | {"database_rows": "classifier"})


def test_from_the_command_line_to_an_answer(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / NAME / "phone.heic").touch()
    main(["index", "museum", "out", *AS_OPTIONS])
    printed = " ".join(capsys.readouterr().out.split())
    assert "note: left aside: 1 .heic" in printed
    assert "8 images of 6 exhibits" in printed and "RANDOM WEIGHTS" in printed
    assert "whitened to 7 dimensions instead of 512" in printed and "metilr identify PHOTO --store out" in printed
    main(["identify", str(folder / NAME), "--store", "out", "--json", "--accelerator", "cpu"])
    document = json.loads(capsys.readouterr().out)
    aside, *answered = document["photos"]
    assert aside["photo"] == str(folder / NAME) and aside["error"].startswith("left aside: 1 .heic; convert")
    assert [photo["exhibit"] for photo in answered] == [NAME, NAME]
    assert {photo["decision"] for photo in answered} == {"undecided"}
    assert not any("confidence" in photo for photo in answered)  # without val nobody knows what it is worth
    assert document["threshold"]["log_confidence"] is None and "give one" in document["threshold"]["origin"]


def test_a_csv_gives_the_rows_of_the_folder(indexed, tmp_path):
    paths = Index.load(indexed / "index").catalogue.paths
    lines = ["path,exhibit", *(f"{path},No. {path.split('/')[0]}" for path in reversed(paths))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    index(indexed / "museum", tmp_path / "by_csv", csv=tmp_path / "list.csv", **INDEXED)
    one, other = (open_index(path)[0] for path in (indexed / "index", tmp_path / "by_csv"))
    assert other.exhibits[-1] == f"No. {NAME}"
    np.testing.assert_allclose(
        one.database.rows @ one.database.rows.T, (other.database.rows @ other.database.rows.T)[::-1, ::-1], atol=1e-4
    )


def test_a_finished_index_is_kept_and_says_so_until_options_change(folder, tmp_path, capsys, failure):
    index(folder, tmp_path / "index", **INDEXED)
    command, file = ["index", folder, tmp_path / "index", *AS_OPTIONS], tmp_path / "index" / "index.json"
    before = json.loads(file.read_text())
    del before["options"]["image_shape"]  # as of a metilr that had no such option
    file.write_text(json.dumps(before))
    written = file.read_bytes()
    capsys.readouterr()
    main([str(part) for part in command])
    assert "".join(capsys.readouterr().out.split("\n")) == f"finished already: {tmp_path / 'index'}"
    assert "is finished, with other options (k: null there, 5 now)" in failure(*command, "--k", "5")
    assert 'image_shape: "keep" there, "square" now' in failure(*command, "--image_shape", "square")
    assert (tmp_path / "index/index.json").read_bytes() == written
    main([str(part) for part in [*command, "--quiet", "true", "--num_workers", "1"]])  # which make no difference
    assert "finished already" in capsys.readouterr().out


def test_an_interrupted_index_is_continued(folder, tmp_path, capsys, failure):
    index(folder, tmp_path / "index", **INDEXED)
    (tmp_path / "index" / "index.json").unlink()
    assert "not an index" in failure("identify", folder, "--store", tmp_path / "index")
    index(folder, tmp_path / "index", **INDEXED)
    assert "reusing 8 rows" in capsys.readouterr().out


def test_bad_images_stop_or_are_skipped(folder, tmp_path, capsys, failure):
    (folder / "33" / "7.jpg").write_text("no image")
    (folder / "9" / "2.jpg").write_text("no image")
    assert "cannot be decoded" in failure("index", folder, tmp_path / "a", *AS_OPTIONS)
    index(folder, tmp_path / "b", bad_images="skip", **INDEXED)
    letters = "".join(capsys.readouterr().out.split())  # lines break anywhere
    assert "leftout:2images:" in letters
    assert all(f"{folder / name}:cannotbedecoded(" in letters for name in ("33/7.jpg", "9/2.jpg"))
    collection, _ = open_index(tmp_path / "b")
    assert len(collection.images) == 6 and len(collection.exhibits) == 6
    answer = collection.answer(load_photo(folder / "9" / "3.jpg", collection.image_size).image)
    assert answer.exhibit == "9" and collection.path(answer.matches[0].row) == "9/3.jpg"
    assert len(answer.matches) == 5  # the exhibit whose only image is bad is matched by nothing
    line = failure("index", folder, tmp_path / "c", *AS_OPTIONS, "--bad_images", "skip", "--k", "7")
    assert "--k 7: 6 images could be decoded" in line


def test_a_bad_image_that_leaves_too_little_is_named(tmp_path, failure):
    for name in ("good/1.png", "bad/1.png"):
        (tmp_path / "two" / name).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "two" / name)
    (tmp_path / "two/bad/1.png").write_text("no image")
    command = ["index", tmp_path / "two", tmp_path / "index", *AS_OPTIONS]
    assert f"{tmp_path / 'two/bad/1.png'}: cannot be decoded (" in failure(*command)
    line = failure(*command, "--bad_images", "skip", "--whitening", "none")
    assert f"fewer than 2 exhibits have a usable image: {tmp_path / 'two/bad/1.png'}: cannot be decoded (" in line
    (tmp_path / "two/good/1.png").write_text("no image")
    line = failure(*command[:2], tmp_path / "other", *AS_OPTIONS, "--bad_images", "skip")
    assert "two/bad/1.png: cannot be decoded (" in line and "two/good/1.png: cannot be decoded (" in line


def test_help_offers_what_an_index_takes_and_says_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["index", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert not {"--geometric_check", "--geometric_reorder", "--search_device"} & set(words.split())
    assert "chosen on val" not in words and "published recipe" not in words
    assert "--k K Number of neighbours; without it 10" in words
    assert "--tau TAU Inverse temperature of the confidence; without it 50." in words
    assert "in an index: 500 px" in words


def test_few_images_and_a_whitening_from_elsewhere(folder, tmp_path, failure):
    for name in ("9", "12", "33", "41"):
        shutil.rmtree(folder / name)
    shutil.rmtree(folder / NAME)
    assert "has one exhibit, 500" in failure("index", folder, tmp_path / "a", *AS_OPTIONS)
    shutil.copytree(folder / "500", folder / "copy")
    assert "all 2 database descriptors are the same" in failure("index", folder, tmp_path / "b", *AS_OPTIONS)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8)).save(folder / "noise.png")
    basis, _ = np.linalg.qr(rng.normal(size=(96, 20)))
    whitening = PCAWhitening(np.zeros(96), basis, np.ones(96), 1.0, 100, 20)
    whitening.save(tmp_path / "w.npz")
    index(folder, tmp_path / "c", whitening=str(tmp_path / "w.npz"), **INDEXED)
    assert open_index(tmp_path / "c")[0].database.rows.shape == (3, 20)


@pytest.mark.parametrize("name", ["geometric_check", "search_device"])
def test_what_only_an_evaluation_has_is_refused_from_python_too(folder, tmp_path, name):
    method = MethodOptions(**{name: 3 if name == "geometric_check" else "cpu"})
    with pytest.raises(UserError, match=f"{name} (needs val|has no effect on an index)"):
        index_images(folder, tmp_path / "index", method=method)


def test_an_index_is_not_written_among_the_images(folder, failure):
    assert "lies among the images" in failure("index", folder, folder / "INDEX", *AS_OPTIONS)


def test_a_link_in_a_circle_is_no_place_for_an_index(folder, failure, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in failure("index", folder, tmp_path / "loop", *AS_OPTIONS)
    assert not (folder / "INDEX").exists()


def test_another_model_than_the_index_s_is_refused(indexed, tmp_path, failure):
    folder = indexed / "museum"
    shutil.copytree(indexed / "index", tmp_path / "index")
    file = tmp_path / "index" / "index.json"
    content = json.loads(file.read_text())
    for changed in ({"model": {**content["model"], "pooling": "mac"}}, {"image_size": 100}):
        file.write_text(json.dumps({**content, **changed}))
        assert "was made by another model" in failure("identify", folder, "--store", tmp_path / "index")
    file.write_text("{")
    assert "index.json: cannot be read" in failure("identify", folder, "--store", tmp_path / "index")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "9"], "--k 9: the database has 8 images"),
        (["--whitening", "gone.npz"], "gone.npz: no such file"),
        (["--ckpt", "gone.ckpt"], "--backbone has no effect with ckpt"),
        (["--csv", "gone.csv"], "gone.csv: no such file"),
    ],
)
def test_a_bad_option_ends_in_one_line_that_names_it(indexed, tmp_path, failure, options, message):
    assert message in failure("index", indexed / "museum", tmp_path / "index", *AS_OPTIONS, *options)
    assert not (tmp_path / "index" / "index.json").exists()


@pytest.fixture
def strangers(tmp_path) -> Path:
    """Seven photos that show no exhibit, one of them no image."""
    rng = np.random.default_rng(4)
    (tmp_path / "strangers").mkdir()
    for i in range(7):
        Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8)).save(tmp_path / f"strangers/{i}.png")
    return tmp_path / "strangers"


def test_with_a_background_an_answer_tells_how_far_above_it_the_exhibit_is(folder, strangers, tmp_path, capsys):
    options = {"whitening": "none", "query_crops": [0.5], **INDEXED}
    index(folder, tmp_path / "plain", **options)
    index(folder, tmp_path / "index", background=strangers, **options)
    plain, collection = (open_index(tmp_path / name)[0] for name in ("plain", "index"))
    photo = load_photo(folder / "9" / "2.jpg", collection.image_size).image
    height, width = photo.shape[1:]
    crop = photo[:, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2]
    views = plain.describer.describe([photo, crop])
    described = plain.describer.describe(
        [load_photo(each, collection.image_size).image for each in strangers.iterdir()]
    )
    nearest = sorted((max(float(view @ stranger) for view in views) for stranger in described), reverse=True)
    answer, without = collection.answer(photo), plain.answer(photo)
    assert answer.above_background == pytest.approx(answer.similarity - 0.5 * np.mean(nearest[:5]), abs=1e-5)
    assert (answer.exhibit, answer.log_confidence) == (without.exhibit, without.log_confidence)
    assert without.above_background is None
    capsys.readouterr()
    main(["identify", str(folder / "9"), "--store", str(tmp_path / "index"), "--accelerator", "cpu"])
    assert f"{answer.above_background:.3f} above the background" in capsys.readouterr().out


def test_a_background_is_a_folder_of_five_photos_or_more_and_belongs_to_the_index(
    folder, strangers, tmp_path, capsys, failure
):
    command = ["index", folder, tmp_path / "index", *AS_OPTIONS, "--background", strangers]
    main([str(part) for part in command])
    capsys.readouterr()
    main([str(part) for part in command])
    assert "finished already" in capsys.readouterr().out
    shutil.copy(strangers / "1.png", strangers / "8.png")
    main([str(part) for part in command])
    assert len(open_index(tmp_path / "index")[0].background) == 8
    for name in ("1", "2", "3", "8"):
        (strangers / f"{name}.png").unlink()
    command[2] = tmp_path / "another"
    assert f"--background {strangers}: holds 4 photos; name 5 or more" in failure(*command)
    (strangers / "1.png").write_text("no image")
    options = ["--bad_images", "skip"]
    assert f"--background {strangers}: fewer than 5 photos can be described" in failure(*command, *options)


def test_an_address_with_a_password_is_refused_without_telling_it(tmp_path, failure):
    line = failure("index", "https://anna:secret@museum.example/collection", tmp_path / "index", *AS_OPTIONS)
    assert "its address has a password in it" in line and "secret" not in line
    assert not (tmp_path / "index").exists()
