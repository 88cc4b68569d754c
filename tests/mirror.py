"""A mirror of the Met's archives on this machine, made from a museum in its layout."""

import json
from dataclasses import replace
from pathlib import Path

from metilr.download.archives import ARCHIVES
from tests.server import Server
from tests.tarballs import header, tarball, tree

UNKNOWN = {
    name: tuple(replace(archive, size=None, sha256=None) for archive in archives) for name, archives in ARCHIVES.items()
}  # a small museum's archives have other sizes and digests than the Met's


def serve(museum: Path, server: Server) -> None:
    """Put a museum's files into archives as the Met's are, and those on the server."""
    files = tree(museum)
    mini = {f"images/{entry['path']}" for entry in json.loads(files["ground_truth/mini_MET_database.json"])}
    for archive in {archive for archives in ARCHIVES.values() for archive in archives}:
        chosen = [path for path in files if path.startswith(f"{archive.folder}/")]
        if archive.name == "small_MET.tar.gz":
            chosen = [path for path in chosen if path in mini]
        members = [(path.removeprefix("images/"), files[path]) for path in chosen]
        server.files[archive.name] = tarball(header(Path(archive.folder).name, b"5"), *members)
