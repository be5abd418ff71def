"""Which descriptors of this process are routed: the tables that every hook looks into first.

`routed` answers the question of the hot paths (does this write go to Elgate?) by one look-up in a set. `tracked`
holds more: each descriptor whose file is on a route, also those opened for reading only and those that have gone
native, because what is read through them must show what this process has written through the routed ones.

The tables are right as long as descriptors are closed through the hooks. Code in C may close what it was given, and
the number then comes back as something else. A number that a hooked call returns replaces its old entry; duplicates,
which are made to be given away, are proven on each use to be what they were.

Any thread may call anything here, from finalizers and signal handlers too: the lock is reentrant, and what it guards
holds at every step. OSErrors are those of the file, as the native call would have raised them.
"""

from __future__ import annotations

import operator
import os
import threading
from stat import S_ISREG

from elgate._native import NATIVE, answering, by_handler, library, os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Union

    Inode = tuple[int, int]
    Path = Union[str, bytes]

native_close = os.close
native_fstat = os.fstat
native_ftruncate = os.ftruncate
native_get_inheritable = os.get_inheritable
native_lstat = os.lstat
native_open = os.open
native_readlink = os.readlink
native_stat = os.stat

elgate_before_rename = answering(library.elgate_before_rename)
elgate_before_unlink = answering(library.elgate_before_unlink)
elgate_close = answering(library.elgate_close)
elgate_drain = answering(library.elgate_drain)
elgate_drain_all = answering(library.elgate_drain_all)
elgate_ftruncate = answering(library.elgate_ftruncate)
elgate_go_native = answering(library.elgate_go_native)
elgate_path_is_routed = library.elgate_path_is_routed

MAPPED: int = library.ELGATE_REASON_MAPPED
DIRECT: int = library.ELGATE_REASON_DIRECT
KERNEL_COPY: int = library.ELGATE_REASON_KERNEL_COPY
PASSED_ON: int = library.ELGATE_REASON_PASSED_ON
LINKED: int = library.ELGATE_REASON_LINKED
UNSUPPORTED: int = library.ELGATE_REASON_UNSUPPORTED

# Descriptors whose writes go to Elgate, without those in `duplicates`.
routed: set[int] = set()
# Routed as well, but to be proven on each use.
duplicates: set[int] = set()
# Every descriptor of a file on a route.
tracked: dict[int, Inode] = {}
# Routed descriptors with O_APPEND: where the kernel's offset stands is known after a drain only.
appending: set[int] = set()
# The routed descriptors of each file (`routed` and `duplicates`). The set of a file without any is pruned late.
writers: dict[Inode, set[int]] = {}
# The tracked ones that are open for reading only.
readers: dict[Inode, set[int]] = {}
# Descriptors of the explicit API, which unpatch_all leaves alone.
kept: set[int] = set()

_NOWHERE: Inode = (0, 0)

_lock = threading.RLock()
_PRUNE_ABOVE = 64

# Between patch_all and unpatch_all, opens are looked at: with a daemon, those on its routes; without one, those for
# writing, because a file that has records in some daemon's log must not be written past them.
UNPATCHED, ROUTES, MARKS = range(3)
mode = UNPATCHED


def _renew_lock() -> None:
    # Another thread of the parent may have held it at the fork.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


# --- What a caller gave us ---------------------------------------------------------------------------------------


def descriptor(value: object) -> int:
    """The number that the native call will take `value` for; -1 where it will refuse it."""
    if type(value) is int:
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:
        return -1


def descriptor_of(value: object) -> int:
    """As `descriptor`, for calls that also take objects with a fileno()."""
    if isinstance(value, int):
        return value
    try:
        return descriptor(value.fileno())  # type: ignore[attr-defined]
    except Exception:
        return -1


def location_of(path: Path, dir_fd: int | None = None) -> bytes | None:
    """`path` as the client library takes it; None for what cannot be opened (the native call says why)."""
    try:
        location = os.fsencode(path)
    except UnicodeError:
        return None
    if dir_fd is not None and not location.startswith(b"/"):
        try:
            location = native_readlink(b"/proc/self/fd/%d" % descriptor(dir_fd)) + b"/" + location
        except OSError as error:
            if by_handler(error):
                raise
            return None
    return None if b"\0" in location or not location else location


def is_concerned(path: Path, writing: bool, dir_fd: int | None = None) -> bool:
    """Whether an open of `path` must go through `open_descriptor`."""
    if mode == ROUTES:
        location = location_of(path, dir_fd)
        return location is not None and elgate_path_is_routed(location) == 1
    return mode == MARKS and writing


# --- Coming and going --------------------------------------------------------------------------------------------


def open_descriptor(path: Path, flags: int, mode: int = 0o777, dir_fd: int | None = None) -> int:
    """os.open of a path for which `is_concerned` said yes. The descriptor is in `tracked` if Elgate has to do with
    it, and not if it is native after all."""
    # A truncate has its place in the order of writes, and in the log: where the file was there before, it is opened
    # whole, and truncated through Elgate.
    truncate = flags & os.O_TRUNC and flags & os.O_ACCMODE != os.O_RDONLY and not flags & os.O_EXCL
    fd = -1
    if truncate:
        flags &= ~os.O_TRUNC
        if flags & os.O_CREAT:
            try:
                fd = native_open(path, flags | os.O_EXCL, mode, dir_fd=dir_fd)
                truncate = False
            except FileExistsError:
                pass
    if fd < 0:
        fd = native_open(path, flags, mode, dir_fd=dir_fd)
    try:
        adopt(fd, location_of(path, dir_fd) or b"", flags, path)
        if truncate:
            truncate_descriptor(fd, 0, path)
    except BaseException:
        close_descriptor(fd)
        raise
    return fd


def close_descriptor(fd: int) -> None:
    """Closes a descriptor of our own making after an error, which is the one to report."""
    try:
        if fd in tracked:
            forget(fd)
    finally:
        native_close(fd)


def truncate_descriptor(fd: int, length: int, path: Path) -> None:
    """Of our own making, just opened."""
    if fd in routed:
        result = elgate_ftruncate(fd, length)
        if result == 0:
            return
        if result != NATIVE:
            raise os_error(result, path)
        became_native(fd)
    if S_ISREG(native_fstat(fd).st_mode):
        native_ftruncate(fd, length)


def adopt(fd: int, location: bytes, flags: int, filename: object) -> None:
    """A native open of a file on a route has returned `fd`. OSError: the open must fail; the caller closes fd."""
    replaced(fd)
    status = native_fstat(fd)
    if not S_ISREG(status.st_mode):
        return
    inode = (status.st_dev, status.st_ino)
    result = library.elgate_opened(fd, location, flags)
    if result < 0:
        raise os_error(result, filename)
    if result == 0:
        # Two ways to one file would not keep their order.
        go_native_inode(inode, DIRECT if flags & os.O_DIRECT else UNSUPPORTED)
    elif flags & os.O_ACCMODE == os.O_RDONLY:
        _track_reader(fd, inode)
    else:
        with _lock:
            tracked[fd] = inode
            writers.setdefault(inode, set()).add(fd)
            routed.add(fd)
            if flags & os.O_APPEND:
                appending.add(fd)
            if len(writers) > 2 * len(tracked) + _PRUNE_ABOVE:
                _prune()


def _track_reader(fd: int, inode: Inode) -> None:
    with _lock:
        tracked[fd] = inode
        readers.setdefault(inode, set()).add(fd)


def _prune() -> None:
    for inode in [inode for inode, fds in tuple(writers.items()) if not fds]:
        fds = writers.pop(inode, None)
        if fds:  # opened by a signal handler or a finalizer just now
            writers.setdefault(inode, set()).update(fds)


def forget(fd: int) -> OSError | None:
    """Before the native close of a tracked descriptor. The error is what close must report."""
    try:
        result = elgate_close(fd)
    finally:
        _remove(fd)
    return None if result >= 0 or result == NATIVE else os_error(result)


def replaced(fd: int) -> None:
    """The number `fd` has just come into being: what the tables still hold of an earlier one was closed natively."""
    if fd in tracked:
        library.elgate_duplicated(-1, fd)
        _remove(fd)


def _remove(fd: int) -> None:
    with _lock:
        became_native(fd)
        inode = tracked.pop(fd, _NOWHERE)
        fds = readers.get(inode)
        if fds is not None:
            fds.discard(fd)
            if not fds:
                del readers[inode]


def duplicated(fd: int, copy: int) -> None:
    """After a native dup. OSError: the copy is closed again."""
    replaced(copy)
    inode = tracked.get(fd)
    if inode is None:
        return
    was_routed = is_routed(fd)
    is_reader = fd in readers.get(inode, ())
    result = library.elgate_duplicated(fd, copy)
    if was_routed and result >= 0:
        with _lock:
            tracked[copy] = inode
            writers.setdefault(inode, set()).add(copy)
            duplicates.add(copy)
            if fd in appending:
                appending.add(copy)
        return
    if was_routed:
        # One descriptor cannot be routed and its twin not: they share the offset.
        try:
            go_native(fd, UNSUPPORTED)
        except BaseException:
            native_close(copy)
            raise
    if is_reader:
        _track_reader(copy, inode)
    else:
        tracked[copy] = inode


# --- In between --------------------------------------------------------------------------------------------------


def is_routed(fd: int) -> bool:
    """Whether `fd` is routed; a duplicate is proven."""
    return fd in routed or (fd in duplicates and proven(fd))


def proven(fd: int) -> bool:
    """Whether the duplicate `fd` still is what it was: code in C may have closed it. One fstat."""
    try:
        status = native_fstat(fd)
    except OSError as error:
        if by_handler(error):
            raise
        same = False
    else:
        same = tracked.get(fd) == (status.st_dev, status.st_ino)
    if not same:
        replaced(fd)
    return same


def drain(fd: int) -> None:
    """Before a native look at the file behind a descriptor: nothing to do if it is not tracked."""
    inode = tracked.get(fd)
    if inode is not None:
        result = elgate_drain(fd)
        if result >= 0:
            return
        if result != NATIVE:
            raise os_error(result)
        became_native(fd)
        drain_inode(inode)


def drain_inode(inode: Inode) -> None:
    """As `drain`, through whatever descriptors of the file there are."""
    for fd in (*writers.get(inode, ()), *readers.get(inode, ())):
        result = elgate_drain(fd)
        if result >= 0:
            return
        if result != NATIVE:
            raise os_error(result)
        became_native(fd)


def drain_all() -> None:
    result = elgate_drain_all()
    if result < 0 and result != NATIVE:
        raise os_error(result)


def inodes_at(path: Any, dir_fd: int | None = None) -> set[Inode]:
    """The files that have routed descriptors and are meant by `path` (which may be a descriptor), be it itself or
    behind a symbolic link."""
    inodes = set()
    for look in (native_stat, native_lstat):
        try:
            status = look(path, dir_fd=dir_fd)
        except (OSError, TypeError, ValueError) as error:
            if by_handler(error):
                raise
            continue  # the native call says it better
        inode = (status.st_dev, status.st_ino)
        if writers.get(inode):
            inodes.add(inode)
    return inodes


def location_at(path: Any, dir_fd: int | None = None) -> bytes | None:
    """As `location_of`, for whatever the caller gave us."""
    try:
        return location_of(os.fspath(path), dir_fd)
    except TypeError:
        return None


class NameChange:
    """Around a native call that takes a file's name away, or gives it another one: the log hears of it first. OSError:
    it could not, and the call must not be made."""

    __slots__ = ("_kept",)

    def __init__(
        self,
        old: Any,
        old_dir_fd: int | None = None,
        new: Any = None,
        new_dir_fd: int | None = None,
        *,
        replaces: bool = True,
    ) -> None:
        # Of what is removed nothing is to be seen any more, and no earlier error keeps it: removing it may make room.
        if new is not None:
            drain_path(old, old_dir_fd)
        # Where the file is that stays there if nothing comes of it.
        self._kept: bytes | None = None
        if mode != ROUTES:
            return
        source = location_at(old, old_dir_fd)
        if new is None:
            result = elgate_before_unlink(source) if source is not None else 0
            self._kept = source if result == 1 else None
        else:
            target = location_at(new, new_dir_fd)
            if target is not None and not replaces and os.path.lexists(target):
                return  # the native call fails
            result = elgate_before_rename(source, target) if source is not None and target is not None else 0
            self._kept = target if result == 1 else None
        if result < 0:
            raise os_error(result, old)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._kept is not None:
            elgate_before_rename(self._kept, self._kept)


def drain_path(path: Any, dir_fd: int | None = None) -> None:
    """Before a native call that names a file by its path."""
    if writers:
        for inode in inodes_at(path, dir_fd):
            drain_inode(inode)


def became_native(fd: int) -> None:
    """The client library has answered that `fd` is not, or no longer, its own."""
    with _lock:
        routed.discard(fd)
        duplicates.discard(fd)
        appending.discard(fd)
        fds = writers.get(tracked.get(fd, _NOWHERE))
        if fds is not None:
            fds.discard(fd)


def go_native(fd: int, reason: int) -> None:
    """Fences the file behind a tracked descriptor: all that was written is applied and synced, and from here on
    every way to it is native. OSError: the fence could not be logged; the caller's operation must fail."""
    inode = tracked.get(fd)
    if inode is not None:
        _leave(fd, reason)
        go_native_inode(inode, reason)


def go_native_inode(inode: Inode, reason: int) -> None:
    """As `go_native`, through whatever descriptors there are."""
    for fd in tuple(writers.get(inode, ())):
        _leave(fd, reason)


def _leave(fd: int, reason: int) -> None:
    result = elgate_go_native(fd, reason)
    if result < 0 and result != NATIVE:
        raise os_error(result)
    became_native(fd)


def pass_on(explicit: Iterable[int], inheritable: bool) -> None:
    """Before another program starts: the files that it inherits go native, all others are drained.

    `explicit`: descriptors that it gets; `inheritable`: it also gets all those that are marked so."""
    if not writers:
        return
    drain_all()
    given = set(explicit)
    for fd in (*routed, *duplicates):
        if fd in given or (inheritable and _is_inheritable(fd)):
            go_native(fd, PASSED_ON)


def _is_inheritable(fd: int) -> bool:
    try:
        return native_get_inheritable(fd)
    except OSError as error:
        if by_handler(error):
            raise
        replaced(fd)  # closed natively
        return False


def release_all() -> None:
    """For unpatch_all: every hooked file goes native. What the explicit API alone has open stays."""
    for inode, fds in tuple(writers.items()):
        if not fds <= kept:
            go_native_inode(inode, UNSUPPORTED)
    first = None
    for fd in tuple(tracked):
        if fd not in kept:
            first = forget(fd) or first
    if first is not None:
        raise first
