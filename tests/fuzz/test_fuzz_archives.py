"""Archives from elsewhere."""

import gzip
import shutil
import tarfile

from hypothesis import given, strategies as st

from metilr.download.archives import MOST_GROWTH, Archive, unpack
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import PROPERTIES, cases, mutated
from tests.tarballs import header, tar_of, tarball, tree

MET = Archive("MET.tar.gz", "images/MET", depth=2)
MEMBERS = [("MET/1/a.jpg", b"a" * 700), ("MET/1/b.jpg", b"b"), ("MET/2/c.jpg", b""), ("MET/notes.txt", b"x" * 20)]
HOSTILE = [
    tar_of([*MEMBERS[:2], member])
    for member in (
        ("../../out.jpg", b"x"), ("/tmp/out.jpg", b"x"), header("MET/1/l.jpg", tarfile.SYMTYPE, link="/etc/passwd"),
        header("MET/1/h.jpg", tarfile.LNKTYPE, link="MET/1/a.jpg"), header("MET/1/p.jpg", tarfile.FIFOTYPE),
        header("MET/1/d.jpg", tarfile.CHRTYPE), ("MET/1/" + "n" * 300 + ".jpg", b"x"),
    )
]  # fmt: skip
HONEST = [tar_of(MEMBERS, form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]
TOKENS = (
    b"../", b"/", b"\0" * 512, b"ustar\x0000", b"77777777777\0", b"\x80" + b"\0" * 10 + b"\xff", b"1", b"2", b"5",
    b"x", b"g", b"L", b"S",
    b"30 path=../../../x.jpg\n", b"22 size=99999999999999\n", b"19 GNU.sparse.major=1\n", b".jpg",
)  # fmt: skip


def with_sums(tar, rng):
    """Make the headers' checksums right again: a reader then believes what they say."""
    content = bytearray(tar)
    for start in range(0, len(content) - 511, 512):
        block = content[start : start + 512]
        if block[257:262] == b"ustar" or rng.random() < 0.1:
            total = sum(block[:148]) + 256 + sum(block[156:])
            content[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(content)


def extract(root, content):
    root.mkdir(exist_ok=True)
    archive, folder = root / "MET.tar.gz", root / "images"
    archive.write_bytes(content)
    with refusal(archive) as said:
        unpacked = unpack(archive, MET, folder)
        files = tree(folder)
        assert len(files) <= unpacked and not any(name.endswith(".member") for name in files)
        assert all(name.endswith(".jpg") and name.count("/") == 1 for name in files)
        assert sum(map(len, files.values())) <= MOST_GROWTH * archive.stat().st_size
    assert {file.name for file in root.iterdir()} <= {"MET.tar.gz", "images"}
    assert not any(path.is_symlink() or path.is_fifo() for path in folder.rglob("*"))
    shutil.rmtree(folder, ignore_errors=True)
    return said


def test_changed_tars(tmp_path):
    n_read = 0
    for rng in cases(350):
        tar = mutated(rng.choice(rng.choice((HOSTILE, HONEST))), rng, TOKENS)
        n_read += not extract(tmp_path / "root", gzip.compress(with_sums(tar, rng), 1, mtime=0))
    assert n_read > 10
    assert [file.name for file in tmp_path.iterdir()] == ["root"]


def test_changed_streams(tmp_path):
    whole = tarball(*MEMBERS)
    for rng in cases(150):
        extract(tmp_path / "root", mutated(whole, rng, (b"\x1f\x8b\x08\0", b"\0" * 8, b"\xff")))
    assert not extract(tmp_path / "root", whole)


@PROPERTIES
@given(st.dictionaries(st.text("ab é-.", min_size=1, max_size=6), st.binary(max_size=900), max_size=5))
def test_what_is_in_order_is_unpacked_as_it_was(tmp_path, contents):
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    files = {f"7/x{name}.jpg": content for name, content in contents.items()}
    (root / "MET.tar.gz").write_bytes(tarball(*((f"top/{name}", content) for name, content in files.items())))
    assert unpack(root / "MET.tar.gz", MET, root / "images") == len(files)
    assert tree(root / "images") == files
    shutil.rmtree(root / "images")
