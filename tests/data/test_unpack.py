import gc
import gzip
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from metilr.data.unpack import CHUNK, MAX_FILE, MAX_READ, DamagedArchive, HostileArchive, Unpacked, unpack
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

    def unpack(self, content: bytes, depth: int = 2, **options) -> Unpacked:
        self.archive.write_bytes(content)
        return unpack(self.archive, self.folder, depth, ".jpg", **options)

    def outside(self) -> dict[str, bytes]:
        inside = str(self.folder.relative_to(self.around))
        return {name: content for name, content in tree(self.around).items() if not name.startswith(inside)}

    def refused(self, content: bytes, error: type[UserError], depth: int = 2) -> str:
        self.archive.write_bytes(content)
        before = self.outside()
        with pytest.raises(error) as caught:
            self.unpack(content, depth)
        assert self.outside() == before
        assert not [name for name in tree(self.folder) if name.startswith(".")]  # nothing temporary
        assert str(caught.value).startswith(f"{self.archive}: ") and "delete it" in str(caught.value)
        assert "\n" not in str(caught.value)
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
    content = gzip.compress(tar_of([*members, *others], format))
    assert place.unpack(content) == Unpacked(files=len(IMAGES), left_out=3)
    assert tree(place.folder) == IMAGES


def test_queries_lie_in_one_folder(place):
    place.unpack(tarball(("test_met/a.jpg", b"a"), ("test_met/B.JPG", b"b")), depth=1)
    assert tree(place.folder) == {"a.jpg": b"a", "B.JPG": b"b"}


def test_a_data_folder_may_be_a_link_to_a_larger_disk(place):
    place.folder.rmdir()
    place.folder.symlink_to(place.around / "elsewhere")
    place.unpack(tarball(*GOOD))
    assert tree(place.around / "elsewhere") == {**IMAGES, "secret.jpg": b"untouched"}


HOSTILE = {
    "parent": ([("MET/../../evil.jpg", b"x")], "leads out of the folder"),
    "parent, Windows": ([("MET\\..\\..\\evil.jpg", b"x")], "leads out of the folder"),
    "absolute": ([("/tmp/1/evil.jpg", b"x")], "leads out of the folder"),
    "absolute, Windows": ([("C:/1/evil.jpg", b"x")], "leads out of the folder"),
    "drive": ([("MET/1/C:evil.jpg", b"x")], "leads out of the folder"),
    "parent folder": ([header("MET/../..", tarfile.DIRTYPE)], "leads out of the folder"),
    "symlink": ([header("MET/1/1.jpg", tarfile.SYMTYPE, link="/etc/passwd")], "is a link to '/etc/passwd'"),
    "hard link": ([header("MET/1/1.jpg", tarfile.LNKTYPE, link="../secret.jpg")], "is a link to '../secret.jpg'"),
    "linked folder": (
        [header("MET/1", tarfile.SYMTYPE, link="../../../elsewhere"), ("MET/1/secret.jpg", b"x")],
        "'MET/1' is a link to",
    ),
    "character device": ([header("MET/1/1.jpg", tarfile.CHRTYPE)], "is no plain file"),
    "block device": ([header("MET/1/1.jpg", tarfile.BLKTYPE)], "is no plain file"),
    "fifo": ([header("MET/1/1.jpg", tarfile.FIFOTYPE)], "is no plain file"),
    "unheard of": ([header("MET/1/1.jpg", b"Z")], "is no plain file"),
    "another folder": ([("MET/1/1.jpg", b"x"), ("thumbnails/1/1.jpg", b"y")], "lies in another folder"),
    "too shallow": ([("1.jpg", b"x")], "lies in another folder"),
    "absurd size": ([header("MET/1/1.jpg", tarfile.REGTYPE, 1 << 62)], f"claims {1 << 62:,} bytes"),
    "too large": ([header("MET/1/1.jpg", tarfile.REGTYPE, MAX_FILE + 1)], "too many to be true"),
    "bomb": ([(f"MET/1/{i}.jpg", bytes(1 << 22)) for i in range(4)], "too many to be true"),
    "bomb among what is left out": ([("MET/1/1.txt", bytes(1 << 24))], "too many to be true"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("before", [[], GOOD])
def test_hostile_members_stop_with_archive_and_member(place, kind, before):
    members, said = HOSTILE[kind]
    content = gzip.compress(tar_of([*before, *members]))
    message = place.refused(content, HostileArchive)
    assert said in message and "member '" in message
    assert set(tree(place.folder)) <= set(IMAGES) | {f"1/{i}.jpg" for i in range(4)}


def test_a_sparse_file_is_refused(place):
    """A few bytes that claim to be many."""
    info = header("MET/1/1.jpg", tarfile.GNUTYPE_SPARSE)
    assert "is no plain file" in place.refused(gzip.compress(tar_of([info], tarfile.GNU_FORMAT)), HostileArchive)


@pytest.mark.parametrize("link", ["1", "1/secret.jpg"])
def test_a_link_that_is_there_already_is_not_followed(place, link):
    """Whoever made it: a member would be written elsewhere through it."""
    (place.folder / link).parent.mkdir(exist_ok=True)
    (place.folder / link).symlink_to(place.around / "elsewhere" / link.removeprefix("1").removeprefix("/"))
    place.archive.write_bytes(tarball(("MET/1/secret.jpg", b"x")))
    before = place.outside()
    with pytest.raises(UserError, match=rf"/MET/{link}: is a link in the way of .*MET.tar.gz's member 'MET/1/secret"):
        unpack(place.archive, place.folder, 2, ".jpg")
    assert place.outside() == before and tree(place.around / "elsewhere") == {"secret.jpg": b"untouched"}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_gigabytes_is_not_read_into_memory(place, kind):
    claims = header("x", kind, MAX_READ + 1).tobuf(tarfile.GNU_FORMAT)
    assert f"a header of {MAX_READ + 512:,} bytes" in place.refused(gzip.compress(claims), DamagedArchive)


def test_headers_before_headers_before_headers(place):
    """Tarfile reads each in a call inside the call of the one before."""
    one = header("x", tarfile.XGLTYPE, 0).tobuf(tarfile.USTAR_FORMAT)
    place.refused(gzip.compress(one * 5000 + tar_of(GOOD)), DamagedArchive)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_download_that_ends_early(place, kept):
    content = tarball(*GOOD)
    place.refused(content[: int(kept * len(content))], DamagedArchive)
    assert IMAGES.items() >= tree(place.folder).items()  # what is there is whole


def test_a_tar_that_ends_early_in_a_whole_gzip(place):
    """At a member's end, in a header, in a member, between two members: tarfile takes some of these for the end."""
    whole = tar_of(GOOD)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    last = members[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    for cut in (members[5].offset, members[5].offset + 100, members[5].offset_data + 10, last.offset, end, end + 100):
        place.refused(gzip.compress(whole[:cut]), DamagedArchive)
        assert IMAGES.items() >= tree(place.folder).items()


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", gzip.compress(b""), gzip.compress(b"no tar" * 999), tar_of(GOOD)],
    ids=["empty", "page", "nothing", "no tar", "no gzip"],
)
def test_what_is_no_archive(place, content):
    assert "is damaged or no .tar.gz" in place.refused(content, DamagedArchive)


def test_a_wrong_checksum_and_a_second_archive_behind_the_first(place):
    content = bytearray(tarball(*GOOD))
    content[-6] ^= 1
    place.refused(bytes(content), DamagedArchive)
    long = gzip.compress(tar_of(GOOD) + bytes(MAX_READ + 1))
    assert "goes on after its end mark" in place.refused(long, DamagedArchive)


def test_padding_after_the_end_is_read_to_the_checksum_but_not_for_ever(place):
    """Some megabytes of zeros, or of anything, are a few kB in the archive."""
    whole = tar_of(GOOD)
    padded = gzip.compress(whole + bytes(MAX_READ - len(whole)), 1, mtime=0)
    assert place.unpack(padded) == Unpacked(len(GOOD), 0)
    for rest in (bytes(MAX_READ + CHUNK), b"x" * (MAX_READ + CHUNK)):
        bomb = gzip.compress(whole + rest, 1, mtime=0) + b"no gzip"  # which is not reached
        assert "goes on after its end mark" in place.refused(bomb, DamagedArchive)
    assert tree(place.folder) == IMAGES


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_ends_well_or_in_one_line(place, seed):
    rng = random.Random(seed)
    whole = bytearray(tar_of(GOOD, rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])))
    with tarfile.open(fileobj=io.BytesIO(bytes(whole))) as tar:
        headers = [member.offset for member in tar.getmembers()]
    for _ in range(rng.randint(1, 3)):
        start = rng.choice(headers)
        whole[start + rng.randrange(512)] = rng.randrange(256)
        fields = whole[start : start + 148] + b" " * 8 + whole[start + 156 : start + 512]
        whole[start + 148 : start + 156] = b"%06o\0 " % sum(fields)  # or the checksum would find all of it
    content = gzip.compress(bytes(whole), 1)
    place.archive.write_bytes(content)
    before = place.outside()
    try:
        unpack(place.archive, place.folder, 2, ".jpg")
    except UserError as error:
        assert str(error).startswith(f"{place.archive}: ")
    except OSError as error:
        assert error.filename  # a name that this disk cannot have
    assert place.outside() == before


def test_a_report_can_end_it_and_done_members_are_not_written_again(place):
    class Enough(Exception):
        pass

    def report(members: int, compressed: int) -> None:
        if members == 6:
            raise Enough

    with pytest.raises(Enough):
        place.unpack(tarball(*GOOD), report=report)
    half = tree(place.folder)
    assert len(half) == 6 and IMAGES.items() >= half.items()

    first, second, third = list(IMAGES)[:3]
    (place.folder / first).write_bytes(b"!" * len(IMAGES[first]))  # of the right size: taken for done
    (place.folder / second).write_bytes(b"!")  # of another size: written again
    (place.folder / third).unlink()
    (place.folder / "3/7.jpg").write_bytes(b"!" * len(IMAGES["3/7.jpg"]))  # of no record: written again
    assert place.unpack(tarball(*GOOD), done=6).files == len(IMAGES)
    assert tree(place.folder) == {**IMAGES, first: b"!" * len(IMAGES[first])}
    place.unpack(tarball(*GOOD))
    assert tree(place.folder) == IMAGES


def test_members_do_not_pile_up_in_memory(place):
    """The full database's archive has 400,000."""
    alive: list[int] = []

    def count(members: int, compressed: int) -> None:
        alive.append(sum(type(each) is tarfile.TarInfo for each in gc.get_objects()))

    place.unpack(tarball(*GOOD), report=count)
    assert len(alive) == len(GOOD) and max(alive) == alive[0]


KILLED = """
import os, signal, sys
from pathlib import Path
from metilr.data.unpack import unpack
archive, folder, when, n = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
replace, calls = Path.replace, []
def killed_replace(self, target):
    calls.append(target)
    if len(calls) == n and when == "before": os.kill(os.getpid(), signal.SIGKILL)
    replace(self, target)
    if len(calls) == n: os.kill(os.getpid(), signal.SIGKILL)
Path.replace = killed_replace
unpack(archive, folder, 2, ".jpg", report=lambda members, compressed: print(members, flush=True))
"""


@pytest.mark.parametrize(("when", "n"), [("before", 1), ("after", 1), ("before", 6), ("after", 10)])
def test_a_killed_unpacking_is_continued(place, when, n):
    place.archive.write_bytes(tarball(*GOOD))
    run = subprocess.run(
        [sys.executable, "-c", KILLED, place.archive, place.folder, when, str(n)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    left = tree(place.folder)
    temporary = left.pop(".MET.tar.gz.member", None)
    assert (temporary is not None) == (when == "before") and len(left) == (n if when == "after" else n - 1)
    assert IMAGES.items() >= left.items()
    unpack(place.archive, place.folder, 2, ".jpg", done=int(run.stdout.split()[-1]))
    assert tree(place.folder) == IMAGES
