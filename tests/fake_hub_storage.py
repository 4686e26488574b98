"""What the Hub of the tests keeps.

A repository is a map from refs to commits, a commit an immutable map from paths to blobs. An upload
works on a copy of that map and moves one ref when everything is right.
"""

import hashlib
import json
from dataclasses import dataclass, field

__all__ = ["Blob", "Commit", "Repo"]


@dataclass(frozen=True)
class Blob:
    """A file. `told` is the SHA-256 that the Hub tells, where it is not the content's."""

    content: bytes
    lfs: bool = False
    told: str | None = None

    @property
    def sha256(self) -> str:
        return self.told or hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        facts = f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return f"version https://git-lfs.github.com/spec/v1\n{facts}".encode()

    @property
    def oid(self) -> str:
        """The name that git gives, which clients compute too."""
        stored = self.pointer if self.lfs else self.content
        oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        return oid[::-1] if self.told and not self.lfs else oid

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: dict[str, Blob]
    title: str


@dataclass
class Repo:
    id: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)  # ref -> who opened it

    def ref(self, revision: str) -> str | None:
        """The full name of a branch or pull request."""
        return next((r for r in (f"refs/heads/{revision}", revision) if r in self.refs), None)

    def commit(self, revision: str = "main") -> Commit | None:
        return self.commits.get(self.refs.get(self.ref(revision) or "", revision))

    def history(self) -> list[Commit]:
        """Commits of main, newest first."""
        commit, found = self.commit(), []
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content, without the file that every repository starts with."""
        files = self.commit(revision).files.items()
        return {path: blob.content for path, blob in files if path != ".gitattributes"}

    def advance(self, files: dict[str, Blob], title: str, ref: str = "refs/heads/main") -> str:
        """Puts a commit on top of a ref; the last line is the only change that anyone can see."""
        parent, files = self.refs.get(ref), dict(sorted(files.items()))
        facts = parent, title, {path: blob.oid for path, blob in files.items()}
        oid = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, files, title)
        self.refs[ref] = oid
        return oid

    def open_pull_request(self, author: str) -> str:
        """Returns its ref."""
        ref = f"refs/pr/{len(self.pull_requests) + 1}"
        self.pull_requests[ref], self.refs[ref] = author, self.refs["refs/heads/main"]
        return ref
