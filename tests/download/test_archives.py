"""Unpacking: honest archives land where the ground truth looks, hostile and damaged ones end in one line."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from metilr.download.archives import ARCHIVES, LONGEST_READ, Archive, unpack
from metilr.errors import UserError
from tests.tarballs import IMAGES, header, tar_of, tarball, tree

GOOD = [(f"MET/{path}", content) for path, content in IMAGES.items()]


class Place:
    """A folder to unpack into, and all that lies around it."""

    def __init__(self, around: Path) -> None:
        self.around = around
        self.archive, self.folder = around / "archives" / "MET.tar.gz", around / "root" / "images" / "MET"
        for folder in (self.archive.parent, self.folder, around / "elsewhere"):
            folder.mkdir(parents=True)
        (around / "elsewhere" / "secret.jpg").write_text("untouched")

    def unpack(self, content: bytes, depth: int = 2) -> int:
        self.archive.write_bytes(content)
        return unpack(self.archive, Archive("MET.tar.gz", "images/MET", depth), self.folder)

    def outside(self) -> dict[str, bytes]:
        inside = str(self.folder.relative_to(self.around))
        return {name: content for name, content in tree(self.around).items() if not name.startswith(inside)}

    def refused(self, content: bytes) -> str:
        self.archive.write_bytes(content)
        before = self.outside()
        with pytest.raises(UserError) as caught:
            self.unpack(content)
        assert self.outside() == before and "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{self.archive}: cannot be unpacked") and "delete it" in str(caught.value)
        bomb = {f"1/{i}.jpg": bytes(1 << 22) for i in range(4)}
        for name, content in tree(self.folder).items():
            assert name.endswith(".member") or content in (IMAGES.get(name), bomb.get(name)), name
        return str(caught.value)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("top", ["MET/", "./MET/", "small_MET/MET/", ""])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_files_go_where_the_ground_truth_looks(place, top, format):
    """Whatever the archive calls its top folder."""
    members = [header("./", tarfile.DIRTYPE), header("MET", tarfile.DIRTYPE)]
    members += [(top + path, content) for path, content in IMAGES.items()]
    others = [("MET/README", b"x"), ("MET/1/._1.jpg", b"of a Mac"), ("elsewhere/1/list.txt", b"x")]
    assert place.unpack(gzip.compress(tar_of([*members, *others], format))) == len(IMAGES)
    assert tree(place.folder) == IMAGES


def test_queries_lie_in_one_folder(place):
    place.unpack(tarball(("test_met/a.jpg", b"a"), ("test_met/B.JPG", b"b")), depth=1)
    assert tree(place.folder) == {"a.jpg": b"a", "B.JPG": b"b"}


def test_a_data_folder_may_be_a_link_to_a_larger_disk(place):
    place.folder.rmdir()
    place.folder.symlink_to(place.around / "elsewhere")
    place.unpack(tarball(*GOOD))
    assert tree(place.around / "elsewhere") == {**IMAGES, "secret.jpg": b"untouched"}


def test_what_a_machine_that_went_down_left_is_written_again(place):
    """Half a file, and one of the right size that holds zeros."""
    place.unpack(tarball(*GOOD))
    first, second, *_ = [place.folder / path for path in IMAGES]
    first.write_bytes(b"half")
    second.write_bytes(bytes(second.stat().st_size))
    place.unpack(tarball(*GOOD))
    assert tree(place.folder) == IMAGES


HOSTILE = {
    "parent": [("MET/../../evil.jpg", b"x")],
    "parent folder": [header("MET/../..", tarfile.DIRTYPE)],
    "symlink": [header("MET/1/1.jpg", tarfile.SYMTYPE, link="/etc/passwd")],
    "symlink within": [header("MET/1/1.jpg", tarfile.SYMTYPE, link="2.jpg")],
    "hard link": [header("MET/1/1.jpg", tarfile.LNKTYPE, link="../secret.jpg")],
    "linked folder": [header("MET/1", tarfile.SYMTYPE, link="../../../elsewhere"), ("MET/1/secret.jpg", b"x")],
    "character device": [header("MET/1/1.jpg", tarfile.CHRTYPE)],
    "block device": [header("MET/1/1.jpg", tarfile.BLKTYPE)],
    "fifo": [header("MET/1/1.jpg", tarfile.FIFOTYPE)],
    "too shallow": [("1.jpg", b"x")],
    "absurd size": [header("MET/1/1.jpg", tarfile.REGTYPE, 1 << 62)],
    "bomb": [(f"MET/1/{i}.jpg", bytes(1 << 22)) for i in range(4)],
    "bomb among what is left out": [("MET/1/1.txt", bytes(1 << 24))],
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("before", [[], GOOD])
def test_hostile_members_stop_with_archive_and_member(place, kind, before):
    place.refused(gzip.compress(tar_of([*before, *HOSTILE[kind]])))


def test_an_absolute_path_is_taken_as_one_within(place):
    place.unpack(tarball(("/tmp/1/evil.jpg", b"x")))
    assert tree(place.folder) == {"1/evil.jpg": b"x"}


def test_a_link_that_is_there_already_is_not_followed(place):
    (place.folder / "1").symlink_to(place.around / "elsewhere")
    assert "leads out" in place.refused(tarball(("MET/1/secret.jpg", b"x")))
    assert tree(place.around / "elsewhere") == {"secret.jpg": b"untouched"}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_gigabytes_is_not_read_into_memory(place, kind):
    assert "a header of" in place.refused(gzip.compress(header("x", kind, LONGEST_READ + 1).tobuf(tarfile.GNU_FORMAT)))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_download_that_ends_early(place, kept):
    content = tarball(*GOOD)
    place.refused(content[: int(kept * len(content))])


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", gzip.compress(b"no tar" * 999), tar_of(GOOD)],
    ids=["empty", "page", "no tar", "no gzip"],
)
def test_what_is_no_archive(place, content):
    place.refused(content)


def test_a_wrong_checksum_and_what_lies_behind_the_end(place):
    content = bytearray(tarball(*GOOD))
    content[-6] ^= 1
    place.refused(bytes(content))
    place.refused(gzip.compress(tar_of(GOOD) + b"more"))


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_ends_well_or_in_one_line(place, seed):
    """A damaged header in the middle looks like the end of the archive."""
    rng = random.Random(seed)
    whole = bytearray(tar_of(GOOD, rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])))
    with tarfile.open(fileobj=io.BytesIO(bytes(whole))) as tar:
        headers = [member.offset for member in tar.getmembers()]
    for _ in range(rng.randint(1, 3)):
        start = rng.choice(headers)
        for place_of_damage in range(start, start + rng.randint(1, 512)):
            whole[place_of_damage] = rng.randrange(256)
    place.refused(gzip.compress(bytes(whole)))


def test_the_official_archives():
    """As published on the dataset's page."""
    known = {archive.name: (archive.size, archive.sha256) for archives in ARCHIVES.values() for archive in archives}
    assert known["test_met.tar.gz"] == (34_048_842, "2bc9b2e906d5fc69c4c136860b42604ef867b69ada10f1e08aa49175cbe08a35")
    assert known["small_MET.tar.gz"][0] == 2_865_082_125
    assert set(known) == {
        "ground_truth.tar.gz", "test_met.tar.gz", "test_other.tar.gz", "test_noart.tar.gz", "small_MET.tar.gz",
        "MET.tar.gz",
    }  # fmt: skip
