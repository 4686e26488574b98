"""Folders of the user that nobody else can change, to keep what is loaded as code.

The user's cache comes first. Where it cannot be used, because it is read-only, full, mounted noexec
or open to others, a folder under the temporary directories takes its place.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cache_folders", "make_private", "stranger"]

_TEMPORARY = ("/tmp", "/var/tmp")  # a folder in them is made private, and checked


def cache_folders() -> Iterator[Path]:
    """Where libraries may be kept, the user's cache first; the XDG rules ignore relative paths."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = Path(os.path.expanduser("~"))  # Path.home() raises for a user that has no home
    if asked.is_absolute():
        yield asked / "qvlm_hf"
    elif home.is_absolute():
        yield home / ".cache" / "qvlm_hf"
    for base in dict.fromkeys((os.environ.get("TMPDIR", ""), *_TEMPORARY)):
        if Path(base).is_absolute() and Path(base).is_dir():
            yield Path(base) / f"qvlm_hf-{os.getuid()}"


def make_private(folder: Path) -> Path:
    """The folder without symbolic links, made if need be, if nobody else can change what is in it.

    Raises:
        OSError: it cannot be made, nothing is loaded from it, or others can write to it or to a
            directory on the way.
    """
    _make(folder)
    if folder.is_symlink() and folder.lstat().st_uid not in (os.getuid(), 0):
        raise PermissionError(errno.EPERM, "a symbolic link that another user made", str(folder))
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise PermissionError(errno.EPERM, "mounted noexec", str(folder))
    real = folder.resolve()  # a link on the way may be changed between this check and loading
    for path in (real, *real.parents):
        if why := stranger(path):
            raise PermissionError(errno.EPERM, why, str(path))
    return real


def _make(folder: Path) -> None:
    """As `mkdir -p`, every new directory for the user alone."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def stranger(path: Path) -> str | None:
    """Why another user can change what lies at `path`, or None.

    Others may write to a directory with the sticky bit, such as /tmp: what is ours in it stays
    ours. The owner of / is trusted, because it can change everything (root, or whoever root is
    called in a user namespace).
    """
    found = path.lstat()
    if found.st_uid not in (os.getuid(), 0, Path("/").stat().st_uid):
        return f"it belongs to another user (uid {found.st_uid})"
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    group = found.st_mode & stat.S_IWGRP and not _alone_in(found.st_gid)
    if (found.st_mode & stat.S_IWOTH or group) and not sticky:
        return "others can write to it (chmod go-w mends that)"
    return None


def _alone_in(group: int) -> bool:
    """Whether this is the user's private group, which many systems make and let write."""
    import grp  # not at the top: Windows has neither
    import pwd

    try:
        user, found = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}
