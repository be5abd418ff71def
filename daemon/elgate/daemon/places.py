"""Where things lie when nobody says otherwise, and what kind of storage a directory is on.

Root's daemon serves the host: /run/elgate and /var/lib/elgate. Anyone else's serves its user, from directories
that are theirs. Nothing here needs a configuration file, and nothing is created but by `user_runtime_directory`.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# File systems whose files are gone after a power cut, or (overlay) with their container.
VOLATILE_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "overlay", "aufs"})


class UnsafeDirectory(Exception):
    """A directory that others could write to, where only this user's may stand. The message says what to do."""


def user_runtime_directory() -> Path:
    """The directory for the control socket, private to this user.

    The last choice, for sessions without a login manager, is a directory under /tmp; it is created here, at once
    with its final mode, and refused if somebody else was there first.
    """
    uid = os.getuid()
    if uid == 0:
        return Path("/run/elgate")
    from_environment = os.environ.get("XDG_RUNTIME_DIR")
    if from_environment and os.path.isabs(from_environment):
        return Path(from_environment) / "elgate"
    login_directory = Path(f"/run/user/{uid}")
    if login_directory.is_dir() and os.access(login_directory, os.W_OK | os.X_OK):
        return login_directory / "elgate"
    directory = Path(f"/tmp/elgate-{uid}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or stat.S_IMODE(status.st_mode) & 0o077:
        raise UnsafeDirectory(
            f"{directory} must be a directory of uid {uid} with mode 0700, and is not (somebody else may have "
            f"made it): remove it, or set XDG_RUNTIME_DIR to a private directory"
        )
    return directory


def default_socket() -> Path:
    return user_runtime_directory() / "control.sock"


def default_ring() -> Path:
    uid = os.getuid()
    return Path("/dev/shm/elgate_ring" if uid == 0 else f"/dev/shm/elgate_ring-u{uid}")


def default_state_directory() -> Path:
    if os.getuid() == 0:
        return Path("/var/lib/elgate")
    from_environment = os.environ.get("XDG_STATE_HOME")
    if from_environment and os.path.isabs(from_environment):
        return Path(from_environment) / "elgate"
    return Path.home() / ".local" / "state" / "elgate"


class Filesystem(NamedTuple):
    type: str
    mount_point: str
    device: str

    @property
    def volatile(self) -> bool:
        return self.type in VOLATILE_FILESYSTEMS

    def __str__(self) -> str:
        return f"{self.type} on {self.device}" if self.device.startswith("/dev/") else self.type


def filesystem_of(path: Path) -> Filesystem:
    """The file system that `path` (or the nearest of its parents that exists) is on."""
    resolved = os.path.realpath(path)
    best: Filesystem | None = None
    # Later mounts hide earlier ones at the same place: of equals, the last one counts.
    for device, mount_point, kind in mounts():
        inside = resolved == mount_point or resolved.startswith(mount_point.rstrip("/") + "/")
        if inside and (best is None or len(mount_point) >= len(best.mount_point)):
            best = Filesystem(kind, mount_point, device)
    return best or Filesystem("unknown", "/", "")


def mounts(table: str | Path = "/proc/self/mounts") -> Iterator[list[str]]:
    """Device, mount point and type of each mount: proc_pid_mounts(5)."""
    with open(table, "rb") as lines:
        for line in lines:
            # Blanks and backslashes stand in octal.
            yield [
                re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), os.fsdecode(field))
                for field in line.split(b" ")[:3]
            ]


def scratch_directory(prefix: str) -> Path:
    """Creates a directory of its own (mode 0700), on a real disk if this machine has one to write to.

    Tried in turn: TMPDIR (or /tmp), /var/tmp, beside the user's state directory, the current directory. Where all of
    them are volatile the first one that can be written is taken: the caller asks `filesystem_of` and says so.
    """
    import tempfile

    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), default_state_directory().parent, Path.cwd()]
    writable = [candidate for candidate in candidates if os.access(candidate, os.W_OK | os.X_OK)]
    if not writable:
        raise OSError(f"none of these directories can be written to: {', '.join(map(str, candidates))}")
    chosen = next((path for path in writable if not filesystem_of(path).volatile), writable[0])
    return Path(tempfile.mkdtemp(prefix=prefix, dir=chosen))
