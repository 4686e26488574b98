"""What the Hub of the tests keeps: contents by their hash, commits that never change, refs that
move.

A repository is a map from refs to commits, a commit an immutable map from paths to blobs. An upload
works on a copy of that map and moves one ref when everything is right: one that fails leaves the
branch as it was. Contents lie in a directory, complete or absent; the history is in memory.

Left out: trees and commits in git's format. A blob's `oid` is git's, because clients compute it; a
commit's is a hash of the same facts.
"""

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["Blob", "Commit", "PullRequest", "Repo", "Store", "now"]


@dataclass(frozen=True)
class Blob:
    """A file.

    The content lies under its sha256; `oid` is git's name of it (of the pointer where it is an LFS
    file).
    """

    size: int
    sha256: str
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: dict[str, Blob]  # by path, sorted
    title: str
    description: str
    author: str
    date: str


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    date: str

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


class Store:
    """Contents by sha256, in a directory: what came in one piece, and what came by Xet, which is
    put together when a commit names it.
    """

    def __init__(self, root: Path):
        self.objects, self.xet = root.absolute() / "objects", root.absolute() / "xet"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.xet.mkdir(exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.objects / sha256

    def add(self, blocks: Iterable[bytes]) -> str:
        """Keeps a content and returns its sha256."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.objects, delete=False) as file:
            try:
                for block in blocks:
                    digest.update(block)
                    file.write(block)
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, self.path(digest.hexdigest()))
        return digest.hexdigest()

    def regular(self, content: bytes) -> Blob:
        return Blob(len(content), self.add([content]), _git_oid(content), lfs=False)

    def pointed(self, sha256: str) -> Blob:
        """The LFS file of a content that is here."""
        blob = Blob(self.path(sha256).stat().st_size, sha256, "", lfs=True)
        return Blob(blob.size, sha256, _git_oid(blob.pointer), lfs=True)

    def xet_directory(self) -> Path:
        """A new one for each upload: two clients would wait for each other's lock in the same."""
        return Path(tempfile.mkdtemp(dir=self.xet))

    def has(self, sha256: str) -> bool:
        """Whether the content is here.

        Looks through the Xet uploads, and keeps what it finds there.
        """
        target = self.path(sha256)
        for directory in () if target.exists() else self.xet.iterdir():
            found = _xet_files(directory).get(sha256)
            if found is not None:
                _xet_rebuild(directory, *found, target.with_suffix(".xet"))
                target.with_suffix(".xet").rename(target)
                break
        return target.exists()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _xet_files(directory: Path) -> dict[str, tuple[str, int]]:
    """sha256 -> (Xet hash, bytes) of the files in a directory's shards.

    A shard is records of 48 bytes: a header; then per file its hash, flags and number of segments,
    the segments, as many checks (bit 31 of the flags) and the sha256 (bit 30). A record of 0xff
    ends the files. A hash is four little-endian words."""
    found = {}
    for shard in directory.glob("xet/xorbs/shards/*.mdb"):
        data = shard.read_bytes()
        records = list(struct.iter_unpack("<32s4I", data[: len(data) // 48 * 48]))
        at = 1
        while records[at][0] != b"\xff" * 32:
            hash_, flags, segments = records[at][:3]
            size = sum(record[2] for record in records[at + 1 : at + 1 + segments])
            at += 1 + segments * (2 if flags >> 31 else 1)
            if flags >> 30 & 1:
                found[_xet_hex(records[at][0])] = _xet_hex(hash_), size
                at += 1
    return found


def _xet_hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _xet_rebuild(directory: Path, hash_: str, size: int, target: Path) -> None:
    """Puts one file together, from a copy: the client may still hold the lock of its directory."""
    import hf_xet

    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
            group.start_download_file(hf_xet.XetFileInfo(hash_, size), str(target))


@dataclass
class Repo:
    """A repository. Tests read `files`, `tree`, `history`, `refs` and `pull_requests`."""

    id: str
    private: bool
    store: Store
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def ref(self, revision: str) -> str | None:
        """The full name of a branch or pull request."""
        return next(
            (name for name in (f"refs/heads/{revision}", revision) if name in self.refs), None
        )

    def commit(self, revision: str = "main") -> Commit | None:
        ref = self.ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        return self.commits.get(revision)

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits, newest first."""
        commit, found = self.commit(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found

    def tree(self, revision: str = "main") -> dict[str, Blob]:
        commit = self.commit(revision)
        assert commit is not None, f"{self.id} has no revision {revision}"
        return commit.files

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        tree = self.tree(revision).items()
        return {path: self.store.path(blob.sha256).read_bytes() for path, blob in tree}

    def advance(
        self, ref: str, files: dict[str, Blob], title: str, description: str, author: str
    ) -> Commit:
        """Puts a commit on top of a ref; the last line is the only change that anyone can see."""
        facts = (self.refs.get(ref), dict(sorted(files.items())), title, description, author, now())
        oid = hashlib.sha1(json.dumps(facts, default=vars).encode()).hexdigest()
        self.commits[oid] = Commit(oid, *facts)
        self.refs[ref] = oid
        return self.commits[oid]

    def open_pull_request(self, title: str, description: str, author: str) -> PullRequest:
        pull = PullRequest(len(self.pull_requests) + 1, title, description, author, now())
        self.pull_requests[pull.num] = pull
        self.refs[pull.ref] = self.refs["refs/heads/main"]
        return pull
