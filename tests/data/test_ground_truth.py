import unicodedata

import numpy as np
import pytest

from metilr.data.ground_truth import load_ground_truth
from metilr.errors import UserError
from metilr.extraction.describe import image_sizes, require_images
from tests.museum import DATABASE_IDS, write_ground_truth

DATABASE = [{"id": 7, "path": "MET/7/0.jpg"}, {"id": 3, "path": "MET/3/0.jpg"}, {"id": 7, "path": "MET/7/1.jpg"}]
VAL = [{"path": "test_met/a.jpg", "MET_id": 7}, {"path": "test_other/a.jpg", "category": "x"}]
TEST = [{"path": "test_noart/b.jpg"}, {"path": "test_met/b.jpg", "MET_id": 3, "photographer": "p"}]


def refusal(root, database="full"):
    with pytest.raises(UserError) as caught:
        load_ground_truth(root, database)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_parsing_keeps_file_order_and_labels_ascend_with_the_exhibit_ids(tmp_path):
    truth = load_ground_truth(write_ground_truth(tmp_path, DATABASE, VAL, TEST))
    assert truth.paths["database"] == ("MET/7/0.jpg", "MET/3/0.jpg", "MET/7/1.jpg")
    assert truth.exhibit_ids.tolist() == [3, 7]
    assert truth.labels["database"].tolist() == [1, 0, 1]
    assert truth.labels["val"].tolist() == [1, -1]
    assert truth.labels["test"].tolist() == [-1, 0]
    assert {labels.dtype for labels in truth.labels.values()} == {np.dtype(np.int64)}
    assert truth.n_classes == 2 and truth.n_met("val") == 1
    assert truth.image("MET/3/0.jpg") == tmp_path / "images" / "MET" / "3" / "0.jpg"
    assert truth.counts() == {
        "database_images": 3, "exhibits": 2, "val_queries": 2, "test_queries": 2, "val_met": 1, "test_met": 1,
    }  # fmt: skip


def test_tiny_museum_full_and_mini(tiny_museum):
    full, mini = load_ground_truth(tiny_museum), load_ground_truth(tiny_museum, "mini")
    assert full.exhibit_ids[full.labels["database"]].tolist() == list(DATABASE_IDS)
    assert mini.exhibit_ids[mini.labels["database"]].tolist() == list(DATABASE_IDS[:6])
    assert mini.exhibit_ids[mini.labels["val"][:4]].tolist() == full.exhibit_ids[full.labels["val"][:4]].tolist()
    assert full.fingerprint() != mini.fingerprint()
    assert full.fingerprint() == load_ground_truth(tiny_museum).fingerprint()


def test_missing_root_and_file(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere") and "nowhere" in refusal(tmp_path / "nowhere")
    write_ground_truth(tmp_path, DATABASE, VAL, TEST)
    assert "mini_MET_database.json: no such file" in refusal(tmp_path, "mini")


@pytest.mark.parametrize(
    "content",
    [b"{not json", b"", b'[{"path": "caf\xe9.jpg"}]', b"[" * 200_000, b'[{"id": ' + b"1" * 5000 + b"}]"],
    ids=["malformed", "empty file", "not UTF-8", "nested too deep", "too many digits"],
)
def test_what_is_no_json_is_refused(tmp_path, content):
    write_ground_truth(tmp_path, DATABASE, VAL, TEST)
    (tmp_path / "ground_truth" / "testset.json").write_bytes(content)
    assert "testset.json: not valid JSON" in refusal(tmp_path)


@pytest.mark.parametrize("content", [[], {}, {"id": 1, "path": "a.jpg"}, 3])
def test_file_must_be_a_list_with_entries(tmp_path, content):
    assert "non-empty JSON list" in refusal(write_ground_truth(tmp_path, content, VAL, TEST))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (5, "entry 1 must be an object with a 'path', found 5"),
        ({"id": True, "path": "x.jpg"}, "entry 1: 'id' must be a whole number >= 0, found True"),
        ({"id": -4, "path": "x.jpg"}, "found -4"),
        ({"id": 2**63, "path": "x.jpg"}, "'id' must be a whole number"),
        ({"path": "x.jpg"}, "'id' must be a whole number >= 0, found None"),
        ({"id": 1}, "entry 1: 'path' must name a file inside images/, found None"),
        ({"id": 1, "path": ""}, "'path' must name"),
        ({"id": 1, "path": "/etc/passwd"}, "'path' must name a file inside images/, found '/etc/passwd'"),
        ({"id": 1, "path": "MET/../../x.jpg"}, "'path' must name"),
        ({"id": 1, "path": "a\0.jpg"}, "'path' must name"),
        ({"id": 1, "path": "a\ud800.jpg"}, "'path' must name"),
    ],
)
def test_database_entries_of_wrong_form_are_refused_by_place(tmp_path, entry, said):
    message = refusal(write_ground_truth(tmp_path, [DATABASE[0], entry], VAL, TEST))
    assert "MET_database.json" in message and said in message


@pytest.mark.parametrize("key", ["id", "ID", "met_id", "Met_ID", "METid", "MET-id", "MET_id ", "MET id"])
def test_a_query_whose_exhibit_stands_under_another_key_is_no_distractor(tmp_path, key):
    message = refusal(write_ground_truth(tmp_path, DATABASE, [*VAL, {"path": "v/9.jpg", key: 7}], TEST))
    assert f"valset.json: entry 2: has {key!r}, a query's exhibit is 'MET_id'; rename it" in message


def test_repeated_paths_within_and_across_files(tmp_path):
    message = refusal(write_ground_truth(tmp_path, [*DATABASE, {"id": 9, "path": "MET/3/0.jpg"}], VAL, TEST))
    assert "MET_database.json: entry 3: path 'MET/3/0.jpg' is listed already (entry 1)" in message
    message = refusal(write_ground_truth(tmp_path, DATABASE, VAL, [*TEST, VAL[0]]))
    assert "testset.json: entry 2" in message and "valset.json, entry 0)" in message
    other_spelling = {"path": "./test_met//a.jpg", "MET_id": 7}
    assert "is listed already" in refusal(write_ground_truth(tmp_path, DATABASE, VAL, [*TEST, other_spelling]))


def test_names_are_compared_in_one_unicode_form(tmp_path):
    nfd = unicodedata.normalize("NFD", "é")
    test = [*TEST, {"path": "Musée/1.jpg", "photographer": "é"}, {"path": f"Mus{nfd}e/2.jpg", "photographer": nfd}]
    truth = load_ground_truth(write_ground_truth(tmp_path, DATABASE, VAL, test))
    assert truth.photographers["test"].tolist() == [-1, 0, 1, 1] and truth.kinds("test")[2:] == ["Musée", "Musée"]
    assert truth.paths["test"][3] == f"Mus{nfd}e/2.jpg"  # as the file says
    (tmp_path / "images" / f"Mus{nfd}e").mkdir(parents=True)
    for i in (1, 2):
        (tmp_path / "images" / f"Mus{nfd}e" / f"{i}.jpg").touch()
        assert truth.image(truth.paths["test"][1 + i]).is_file()
    again = [*test, {"path": f"Mus{nfd}e/1.jpg"}]
    assert "entry 4" in refusal(write_ground_truth(tmp_path, DATABASE, VAL, again))


def test_met_queries_of_unknown_exhibits_are_counted_and_named(tmp_path):
    val = [{"path": f"test_met/{i}.jpg", "MET_id": 100 + i} for i in range(5)]
    message = refusal(write_ground_truth(tmp_path, DATABASE, val, TEST, mini=DATABASE))
    assert "5 met queries" in message and "MET_database.json" in message
    assert "test_met/2.jpg (exhibit 102), ..." in message and "test_met/3.jpg" not in message
    assert "--database" not in message  # mini has no more exhibits than full
    assert "use database full" in refusal(tmp_path, "mini")


def test_split_without_met_query_is_refused(tmp_path):
    message = refusal(write_ground_truth(tmp_path, DATABASE, [{"path": "test_other/a.jpg"}], TEST))
    assert "valset.json: no query has a 'MET_id'" in message


def test_missing_and_empty_images_are_all_counted_and_three_named(tiny_museum):
    truth = load_ground_truth(tiny_museum)
    sizes = image_sizes(truth)
    assert {split: len(s) for split, s in sizes.items()} == {"database": 8, "val": 7, "test": 7}
    assert sizes["val"][2] == len(truth.image(truth.paths["val"][2]).read_bytes())
    require_images(truth, sizes, "stop")
    gone = [truth.paths["database"][1], *truth.paths["test"][:3]]
    for path in gone[:-1]:
        truth.image(path).unlink()
    truth.image(gone[-1]).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        require_images(truth, image_sizes(truth), "stop")
    message = str(caught.value)
    assert "4 image files are missing or empty (database 1, test 3)" in message and "bad_images skip" in message
    assert f"{', '.join(gone[:3])}, ...;" in message and gone[3] not in message


def test_published_files_have_the_published_counts(met_root):
    truth = load_ground_truth(met_root, "mini")
    assert truth.counts() == {
        "database_images": 38_307, "exhibits": 33_501, "val_queries": 2_165, "test_queries": 19_319,
        "val_met": 129, "test_met": 1_003,
    }  # fmt: skip
    val, test = (set(truth.labels[split].tolist()) - {-1} for split in ("val", "test"))
    assert len(val) == 111 and len(test) == 734 and not val & test
    assert "MET_database.json: no such file" in refusal(met_root)
