import errno
import os
import struct
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from metilr.errors import UserError
from metilr.sources.catalogue import read_catalogue


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("vase/front.jpg", "vase/details/foot.png", "bust/a.JPG", "INV 7.jpg", ".trash/x.jpg", "bust/._a.jpg",
                 "bust/notes.txt"):  # fmt: skip
        file = tmp_path / "museum" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "museum"


def write_csv(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    file = folder.parent / "list.csv"
    file.write_bytes(text.encode(encoding))
    return file


def test_a_subfolder_is_an_exhibit_and_so_is_a_loose_image(folder):
    catalogue = read_catalogue(folder)
    assert dict(zip(catalogue.paths, catalogue.exhibits, strict=True)) == {
        "INV 7.jpg": "INV 7",
        "bust/a.JPG": "bust",
        "vase/details/foot.png": "vase",
        "vase/front.jpg": "vase",
    }
    truth = catalogue.ground_truth()
    assert catalogue.names == ("INV 7", "bust", "vase")
    assert truth.labels["database"].tolist() == [0, 1, 2, 2] and truth.query_splits == []
    assert truth.image("bust/a.JPG").samefile(folder / "bust" / "a.JPG")


def test_a_csv_names_images_and_exhibits(folder):
    file = write_csv(
        folder, 'year,exhibit,path\n1900,"Vase, blue",vase/front.jpg\n1901, Büste ,bust/a.JPG\n', "utf-8-sig"
    )
    catalogue = read_catalogue(folder, file)
    assert catalogue.paths == ("vase/front.jpg", "bust/a.JPG") and catalogue.exhibits == ("Vase, blue", "Büste")


def test_another_list_has_another_digest(folder):
    before = read_catalogue(folder).ground_truth().digests
    assert read_catalogue(folder).ground_truth().digests == before
    (folder / "vase" / "front.jpg").rename(folder / "bust" / "front.jpg")
    assert read_catalogue(folder).ground_truth().digests != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path;exhibit\na.jpg;x\n", "its first line must be like path,exhibit"),
        ("", "lists no images"),
        ("path,title\na.jpg,Vase\n", "has no column of exhibits"),
        ("path,exhibit\n", "lists no images"),
        ("path,exhibit\nbust/a.JPG\n", "line 2: has 1 fields where the first line has 2"),
        ("path,exhibit\na.jpg,Madonna, with child\nb.jpg,Vase\n", "line 2: has 3 fields where the first line has 2"),
        ("path,exhibit,exhibit\na.jpg,a,b\n", "line 1: names 'exhibit' twice; remove one"),
        ('path,exhibit\na.jpg,a\nb.jpg,"Vase\nc.jpg,Bust\n', "line 3: is no CSV (unexpected end of data): a quote"),
        ('path,exhibit\na.jpg,"Vase\nb.jpg,"Bust"\n', "line 2: is no CSV"),
        ('path,exhibit\na.jpg,"Vase\nb.jpg,Bust"\nc.jpg,Urn\n', "line 2: 'Vase\\nb.jpg,Bust' has a line break within"),
        ('path,exhibit\na.jpg,a\n"b.jpg\n",Vase\n', "line 3: 'b.jpg\\n' has a line break within"),
        ("path,exhibit\na.jpg,Vase\x0cblue\n", "line 2: 'Vase\\x0cblue' has a line break within"),
        ('path,exhibit\na.jpg,a\nb.jpg, "Vase"\n', "line 3: ' \"Vase\"' has a blank before its quote"),
        ("path,exhibit\na.jpg,a\n\nb.jpg,b,\n", "line 4: has 3 fields"),
        ("path,exhibit\nbust/a.JPG,  \n", "line 2: names no exhibit"),
        ("path,exhibit\nbust/a.JPG,a\0b\nc.jpg,d\n", "line 2: exhibit 'a\\x00b' cannot be a name"),
        ("path,exhibit\n../x.jpg,a\n", "line 2: path '../x.jpg' must name a file below"),
        ("path,exhibit\n/etc/x.jpg,a\n", "must name a file below"),
        ("path,exhibit\n,a\n", "names no image; a column like path"),
        ("path,exhibit\na.jpg,a\n./a.jpg,b\n", "line 3: './a.jpg' is listed already in line 2"),
        ("path,exhibit\na.jpg,a\nb.jpg,a\n", "has one exhibit, a"),
    ],
)
def test_a_bad_csv_is_refused_by_name_and_line(folder, text, message):
    file = write_csv(folder, text)
    with pytest.raises(UserError) as error:
        read_catalogue(folder, file)
    assert message in str(error.value) and "list.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_csv_in_another_encoding_is_refused(folder):
    with pytest.raises(UserError, match=r"list\.csv: line 3: is not in UTF-8; save it as CSV in UTF-8"):
        read_catalogue(folder, write_csv(folder, "path,exhibit\nb.jpg,Vase\na.jpg,Büste\n", "latin-1"))


def test_what_a_csv_says_besides_may_run_over_lines(folder):
    text = 'path,note,exhibit\r\nvase/front.jpg,"blue,\r\nsaid ""rare""",Vase\r\n\r\nbust/a.JPG,,Bust\r\n,,Urn\r\n'
    catalogue = read_catalogue(folder, write_csv(folder, text))
    assert catalogue.exhibits == ("Vase", "Bust") and catalogue.left_aside == "1 row without an image"
    with pytest.raises(UserError, match=r"line 6: path '\.\./a' must name a file"):
        read_catalogue(folder, write_csv(folder, text.replace(",,Urn", "../a,,Urn")))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images inside"),
        ([".hidden/a.jpg"], r"no images inside \(but 1 system folder\); name a folder that holds JPEG, .* files"),
        (["a/1.heic", "b/2.HEIC"], r"no images inside \(but 2 \.heic\)"),
        (["a/1.jpg", "a/2.jpg"], "has one exhibit, a; .* give each exhibit a sub-folder"),
        (["a.jpg", "a.png", "b.jpg"], r"a\.jpg and a\.png both make an exhibit a"),
        (["a/1.jpg", "a.jpg"], r"a/1\.jpg and a\.jpg both make an exhibit a"),
    ],
)
def test_a_folder_without_two_clear_exhibits_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        read_catalogue(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    for csv in (None, tmp_path / "list.csv"):
        with pytest.raises(UserError, match="nowhere: no such folder"):
            read_catalogue(tmp_path / "nowhere", csv)


def make_files(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.parametrize("name", [b"\xff\xfe.jpg", b"C\xff/1.jpg"])
def test_a_name_that_an_index_cannot_hold_is_refused_before_anything_is_described(tmp_path, name):
    make_files(tmp_path / "A/1.jpg", tmp_path / "B/1.jpg", tmp_path / os.fsdecode(name))
    with pytest.raises(UserError, match=r"its name is not UTF-8.*rename it"):
        read_catalogue(tmp_path)


def test_a_folder_whose_name_an_index_cannot_hold(tmp_path):
    folder = tmp_path / os.fsdecode(b"C\xff")
    make_files(folder / "1.jpg", folder / "2.jpg")
    with pytest.raises(UserError, match="its name is not UTF-8"):
        read_catalogue(folder)


def test_a_gif_is_an_image_and_what_is_not_read_is_counted(folder):
    names = ("a.GIF", "b.heic", "c.HEIC", "d.avif", ".e.heic", "f.txt")
    make_files(*(folder / "ring" / name for name in names))
    (folder / "linked").symlink_to(folder / "vase")
    (folder / "lost.jpg").symlink_to(folder / "nowhere")  # its fault shows where it is read
    catalogue = read_catalogue(folder)
    assert {"ring/a.GIF", "lost.jpg"} < set(catalogue.paths)
    assert catalogue.left_aside == "1 .avif, 2 .heic, 2 .txt, 1 linked folder, 2 system files, 1 system folder"


def test_the_content_tells_an_image_that_has_no_image_s_ending(folder):
    kinds = {"IMG_0001": "JPEG", "a.jpg_large": "PNG", "b.mpo": "JPEG", "c.12": "WEBP", "d.old": "TIFF", "e.dib": "BMP",
             "f.heic": "GIF"}  # fmt: skip
    for name, kind in kinds.items():
        Image.new("RGB", (9, 7)).save(folder / "vase" / name, kind)
    for number, size in enumerate((12, 40, 52, 56, 64, 108, 124)):  # of a BMP's header, as its format has had them
        (folder / "vase" / f"bmp{number}").write_bytes(b"BM" + bytes(8) + bytes(4) + struct.pack("<I", size))
    for name in ("thumb.NEF", "half.jpg.part", "half.png.crdownload", "Thumbs.db", ".DS_Store"):
        Image.new("RGB", (9, 7)).save(folder / "vase" / name, "TIFF")
    for name in (
        "@eaDir/x/a.jpg",
        "details/__MACOSX/a.jpg",
        "lost+found/b.jpg",
        "$RECYCLE.BIN/c.jpg",
        "#recycle/d.jpg",
    ):
        make_files(folder / "vase" / name)
    (folder / "vase" / "BMW notes").write_text("BMW of the director, and RIFFs of the WEBP kind")
    (folder / "vase" / "letter.pdf").write_bytes(b"%PDF-1.7")
    os.mkfifo(folder / "vase" / "pipe")
    (folder / "vase" / "gone").symlink_to("nowhere")
    catalogue = read_catalogue(folder)
    known = {"front.jpg", "details/foot.png"}
    vase = {path.removeprefix("vase/") for path in catalogue.paths if path.startswith("vase/")}
    assert vase - known == {*kinds, *(f"bmp{i}" for i in range(7))} and vase > known
    assert catalogue.left_aside == (
        "1 .crdownload, 1 .nef, 1 .part, 1 .pdf, 1 .txt, 1 not readable, 1 pipe or device, 3 system files, "
        "6 system folders, 1 of other kinds"
    )


def test_a_loose_image_is_named_without_what_looks_like_an_ending(tmp_path):
    for name in ("IMG_0001", "b.jpg_large", "No. 12 vase", "Inv.7"):
        Image.new("RGB", (9, 7)).save(tmp_path / name, "JPEG")
    assert read_catalogue(tmp_path).names == ("IMG_0001", "Inv.7", "No. 12 vase", "b")


def test_only_files_without_an_image_s_ending_are_opened_and_a_failing_disk_is_no_kind(folder, monkeypatch):
    opened = []

    def fail(self, *_, **__):
        opened.append(self.name)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=r"notes\.txt"):
        read_catalogue(folder)
    assert opened == ["notes.txt"]


def test_a_sub_folder_that_cannot_be_listed_stops(folder, monkeypatch):
    """The tests may be root's, whom nothing stops."""
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("details"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(UserError, match=r"vase/details: cannot be listed \(Permission denied\)"):
            read_catalogue(folder)


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def test_one_name_as_a_mac_and_as_windows_writes_it_is_one_exhibit(tmp_path):
    files = [tmp_path / "Café" / "1.jpg", tmp_path / nfd("Café") / "1.jpg", tmp_path / nfd("Büste.jpg")]
    make_files(*files)
    catalogue = read_catalogue(tmp_path)
    assert catalogue.names == ("Büste", "Café") and sorted(catalogue.exhibits) == ["Büste", "Café", "Café"]
    found = [catalogue.ground_truth().image(path) for path in catalogue.paths]
    assert sorted(found) == sorted(files) and all(file.is_file() for file in found)
    make_files(tmp_path / "Büste.jpg")
    with pytest.raises(UserError, match="both make an exhibit Büste"):
        read_catalogue(tmp_path)


def test_a_csv_names_files_and_exhibits_in_any_form(tmp_path):
    files = [tmp_path / nfd("Musée/é1.jpg"), tmp_path / "Musée" / "2.jpg", tmp_path / nfd("Musée/3.jpg")]
    make_files(*files)
    text = "path,exhibit\nMusée/é1.jpg,Café\n" + nfd("Musée/2.jpg,Café\n") + "Musée/3.jpg,Büste\n"
    catalogue = read_catalogue(tmp_path, write_csv(tmp_path, text))
    assert catalogue.exhibits == ("Café", "Café", "Büste")
    truth = catalogue.ground_truth()
    assert [truth.image(path) for path in catalogue.paths] == files
    with pytest.raises(UserError, match=r"line 5: .* is listed already in line 2"):
        read_catalogue(tmp_path, write_csv(tmp_path, text + nfd("Musée/é1.jpg,Café\n")))
    assert truth.image("Musée/gone.jpg") == tmp_path / "Musée/gone.jpg"


LIKE_A_VASE = ("A vase", "A\u00a0vase", "A  vase", "A vase\u200b", "\ufeffA vase", "A va\u00adse")


def test_names_that_differ_in_what_nobody_sees_are_one_exhibit(tmp_path):
    files = [*(tmp_path / name / "1.jpg" for name in LIKE_A_VASE), tmp_path / "A Vase.jpg"]
    make_files(*files)
    catalogue = read_catalogue(tmp_path)
    assert catalogue.names == ("A Vase", "A vase") and len(catalogue.paths) == 7
    assert sorted(map(catalogue.ground_truth().image, catalogue.paths)) == sorted(files)
    rows = [f"{name}/1.jpg,{name}" for name in LIKE_A_VASE]
    text = "\n".join(["path,exhibit", *rows, "A Vase.jpg,\u06a9\u200c\u06a9"])  # a joiner in Persian is seen
    assert read_catalogue(tmp_path, write_csv(tmp_path, text)).names == ("A vase", "\u06a9\u200c\u06a9")


def test_a_blank_name_is_refused(tmp_path):
    make_files(tmp_path / "\u200b" / "1.jpg", tmp_path / "2.jpg")
    with pytest.raises(UserError, match="the name of its exhibit is blank; rename it"):
        read_catalogue(tmp_path)
    with pytest.raises(UserError, match="line 2: names no exhibit"):
        read_catalogue(tmp_path, write_csv(tmp_path, "path,exhibit\n2.jpg,\u200b\n"))


def test_exhibits_that_a_table_beside_the_folder_lacks_are_said_and_name_nothing(folder):
    catalogue = read_catalogue(folder, write_csv(folder, "exhibit,title\nnobody,Nothing\n"))
    assert catalogue.name == "" and f"{len(catalogue.names)} exhibits are not in the table" in catalogue.left_aside
