"""The functions that stand in for the operating system's while a program is patched.

Each does two things: what concerns Elgate if a tracked descriptor (or a path to such a file) is among its arguments,
and else, after one look-up, the native call with the very same arguments. Wrong arguments always reach the native
call, so that it is the one to complain.

Not seen from here, and so native: code in C that opens or writes files by itself (sqlite3, or io.FileIO when
it is constructed directly), and DirEntry.stat, which may show a size from before the last writes.

A hook is a bound method, because those share the one property of built-in functions that programs rely on without
knowing: standing in a class (`class C: unlink = os.unlink`), they do not bind a second time. What they are bound to
stands for the module, so that hooks pickle as built-in functions do: by name.
"""

from __future__ import annotations

import _posixsubprocess
import fcntl
import importlib
import mmap
import os
import socket
from errno import EINTR, EMFILE, ENFILE
from stat import S_ISREG
from types import MethodType

from elgate import _descriptors
from elgate._descriptors import (
    DIRECT,
    KERNEL_COPY,
    LINKED,
    MAPPED,
    PASSED_ON,
    UNPATCHED,
    UNSUPPORTED,
    NameChange,
    appending,
    became_native,
    close_descriptor,
    descriptor,
    descriptor_of,
    drain,
    drain_all,
    drain_path,
    duplicated,
    duplicates,
    elgate_ftruncate,
    forget,
    go_native,
    go_native_inode,
    inodes_at,
    is_concerned,
    is_routed,
    native_close,
    native_fstat,
    native_ftruncate,
    native_lstat,
    native_open,
    native_stat,
    open_descriptor,
    pass_on,
    proven,
    readers,
    replaced,
    routed,
    tracked,
    truncate_descriptor,
    writers,
)
from elgate._file import OFFSET_MAX, memory_of, native_write, routed_open
from elgate._native import NATIVE, answering, by_handler, ffi, library, os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

elgate_fallocate = answering(library.elgate_fallocate)
elgate_fsync = answering(library.elgate_fsync)
elgate_pwrite = answering(library.elgate_pwrite)
elgate_pwritev = answering(library.elgate_pwritev)
elgate_write = library.elgate_write
elgate_writev = answering(library.elgate_writev)


class Home:
    """Stands for the module that a hook belongs to."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.module,)

    def __repr__(self) -> str:
        return f"<elgate's hooks in {self.module}>"


# ("os", "write"): its hook, and the same for the original.
hooks: dict[tuple[str, str], Any] = {}
originals: dict[tuple[str, str], Any] = {}


def hook(*modules: str, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the function below the hook of `name` in `modules`, the first of which it belongs to. A function that
    this Python does not have is left out."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        attribute = name or function.__name__
        original = getattr(importlib.import_module(modules[0]), attribute, None)
        if original is None:
            return function
        for detail in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(function, detail, getattr(original, detail, None))
        function.__annotations__ = {}  # its signature reads as the original's
        method = MethodType(function, Home(original.__module__))
        for module in modules:
            present = getattr(importlib.import_module(module), attribute, None)
            if present is original:
                hooks[module, attribute] = method
                originals[module, attribute] = original
        return function

    return register


hook("builtins", "io", "_io", name="open")(routed_open)


# --- Opening and closing -----------------------------------------------------------------------------------------


@hook("os", "posix", name="open")
def os_open(home: Home, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    if _descriptors.mode != UNPATCHED:
        number = descriptor(flags)
        if not number & (os.O_PATH | os.O_DIRECTORY):
            # What is no path, the native call says better.
            location = os.fspath(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if location and is_concerned(location, number & os.O_ACCMODE != os.O_RDONLY, dir_fd):
                return open_descriptor(location, number, mode, dir_fd)
    fd = native_open(path, flags, mode, dir_fd=dir_fd)
    if fd in tracked:
        replaced(fd)
    return fd


@hook("os", "posix")
def close(home: Home, fd: int) -> None:
    if (fd if type(fd) is int else descriptor(fd)) not in tracked:
        native_close(fd)
        return
    try:
        error = forget(descriptor(fd))
    finally:
        native_close(fd)
    if error is not None:
        raise error


native_closerange = os.closerange


@hook("os", "posix")
def closerange(home: Home, fd_low: int, fd_high: int, /) -> None:
    low, high = descriptor(fd_low), descriptor(fd_high)
    for fd in tuple(tracked):
        if low <= fd < high:
            forget(fd)  # the native call reports no errors either
    native_closerange(fd_low, fd_high)


native_dup = os.dup


@hook("os", "posix")
def dup(home: Home, fd: int, /) -> int:
    copy = native_dup(fd)
    if tracked:
        duplicated(descriptor(fd), copy)
    return copy


native_dup2 = os.dup2


@hook("os", "posix")
def dup2(home: Home, fd: int, fd2: int, inheritable: bool = True) -> int:
    source, target = descriptor(fd), descriptor(fd2)
    if target in tracked and source != target:
        # dup2(2) keeps silent about what the close of its target runs into: so it is asked for before.
        drain(target)
        native_fstat(fd)
        forget(target)
    copy = native_dup2(fd, fd2, inheritable)
    if tracked and source != target:
        duplicated(source, copy)
    return copy


# Numbers that come back from here are new, whatever the tables hold.


def _fresh(fds: Sequence[int]) -> None:
    if tracked:
        for fd in fds:
            replaced(fd)


native_pipe = os.pipe
native_pipe2 = os.pipe2
native_openpty = os.openpty
native_memfd_create = getattr(os, "memfd_create", None)


@hook("os", "posix")
def pipe(home: Home) -> tuple[int, int]:
    fds = native_pipe()
    _fresh(fds)
    return fds


@hook("os", "posix")
def pipe2(home: Home, flags: int, /) -> tuple[int, int]:
    fds = native_pipe2(flags)
    _fresh(fds)
    return fds


@hook("os", "posix")
def openpty(home: Home) -> tuple[int, int]:
    fds = native_openpty()
    _fresh(fds)
    return fds


@hook("os", "posix")
def memfd_create(home: Home, name: Any, flags: int = getattr(os, "MFD_CLOEXEC", 1)) -> int:
    fd: int = native_memfd_create(name, flags)  # type: ignore[misc]
    _fresh((fd,))
    return fd


# --- Writing -----------------------------------------------------------------------------------------------------


@hook("os", "posix")
def write(home: Home, fd: int, data: Any, /) -> int:
    number = fd if type(fd) is int else descriptor(fd)
    if number not in routed and not (number in duplicates and proven(number)):
        return native_write(fd, data)
    memory = data if type(data) is bytes else memory_of(data)
    while True:
        count: int = elgate_write(number, memory, len(memory))
        if count >= 0:
            return count
        if count != -EINTR:
            return _written(number, count, native_write, fd, data)


def _written(number: int, count: int, native: Callable[..., int], *arguments: Any) -> int:
    if count >= 0:
        return count
    if count == NATIVE:
        became_native(number)
        return native(*arguments)
    raise os_error(count)


native_pwrite = os.pwrite
native_writev = os.writev
native_pwritev = os.pwritev


def _offset_of(value: Any) -> int:
    """-1: the native call refuses it, and writes nothing."""
    offset = descriptor(value)
    return offset if 0 <= offset <= OFFSET_MAX else -1


@hook("os", "posix")
def pwrite(home: Home, fd: int, buffer: Any, offset: int, /) -> int:
    number = fd if type(fd) is int else descriptor(fd)
    if number not in routed and not (number in duplicates and proven(number)):
        return native_pwrite(fd, buffer, offset)
    position = _offset_of(offset)
    if position < 0:
        return native_pwrite(fd, buffer, offset)
    memory = buffer if type(buffer) is bytes else memory_of(buffer)
    count = elgate_pwrite(number, memory, len(memory), position)
    return _written(number, count, native_pwrite, fd, buffer, offset)


def _vectors_of(buffers: Any) -> tuple[Any, int, list[Any]]:
    """struct iovec[], its length, and what keeps its memory alive. Raises what the native call would."""
    try:
        native_writev(-1, buffers)
    except OSError as error:  # a sequence of buffers, then
        if by_handler(error):
            raise
    memories = [memory_of(buffers[index]) for index in range(len(buffers))]
    vectors = ffi.new("struct iovec[]", len(memories))
    for vector, memory in zip(vectors, memories, strict=True):
        vector.iov_base = memory
        vector.iov_len = len(memory)
    return vectors, len(memories), memories


@hook("os", "posix")
def writev(home: Home, fd: int, buffers: Any, /) -> int:
    number = descriptor(fd)
    if not is_routed(number):
        return native_writev(fd, buffers)
    vectors, count, _memory = _vectors_of(buffers)
    written = elgate_writev(number, vectors, count)
    return _written(number, written, native_writev, fd, buffers)


_SYNCHRONOUS = getattr(os, "RWF_DSYNC", 0) | getattr(os, "RWF_SYNC", 0)


@hook("os", "posix")
def pwritev(home: Home, fd: int, buffers: Any, offset: int, flags: int = 0, /) -> int:
    number = descriptor(fd)
    if not is_routed(number):
        return native_pwritev(fd, buffers, offset, flags)
    position = _offset_of(offset)
    options = descriptor(flags)
    if position < 0 or options < 0:
        return native_pwritev(fd, buffers, offset, flags)
    if options & ~_SYNCHRONOUS:
        go_native(number, UNSUPPORTED)
        return native_pwritev(fd, buffers, offset, flags)
    vectors, count, _memory = _vectors_of(buffers)
    written = elgate_pwritev(number, vectors, count, position)
    written = _written(number, written, native_pwritev, fd, buffers, offset, flags)
    if options:
        result = elgate_fsync(number)
        if result < 0 and result != NATIVE:
            raise os_error(result)
    return written


def _sync(native: Callable[[Any], None], fd: Any) -> None:
    number = fd if type(fd) is int else descriptor_of(fd)
    if number not in tracked:
        native(fd)
        return
    inode = tracked[number]
    if number in duplicates and not proven(number):
        native(fd)
        return
    # Through a descriptor that is not routed itself, a program may sync what others have written.
    fds = (number,) if number in routed else tuple(writers.get(inode, ()))
    is_native = number not in routed and number not in duplicates
    for writer in fds:
        result = elgate_fsync(writer)
        if result == NATIVE:
            became_native(writer)
            is_native = True
        elif result < 0:
            raise os_error(result)
    if is_native:
        native(fd)


native_fsync = os.fsync
native_fdatasync = os.fdatasync
native_sync = os.sync


@hook("os", "posix")
def fsync(home: Home, fd: Any) -> None:
    _sync(native_fsync, fd)


@hook("os", "posix")
def fdatasync(home: Home, fd: Any) -> None:
    _sync(native_fdatasync, fd)


@hook("os", "posix")
def sync(home: Home) -> None:
    for fds in tuple(writers.values()):
        for fd in tuple(fds):
            _sync(native_fsync, fd)
    native_sync()


@hook("os", "posix")
def ftruncate(home: Home, fd: int, length: int, /) -> None:
    number = descriptor(fd)
    size = _offset_of(length)
    if size < 0 or not is_routed(number):
        native_ftruncate(fd, length)
        return
    _truncated(number, size, native_ftruncate, fd, length)


def _truncated(number: int, size: int, native: Callable[..., None], *arguments: Any) -> None:
    result = elgate_ftruncate(number, size)
    if result == NATIVE:
        became_native(number)
        native(*arguments)
    elif result < 0:
        raise os_error(result)


native_truncate = os.truncate
native_access = os.access


@hook("os", "posix")
def truncate(home: Home, path: Any, length: int) -> None:
    number, size = descriptor(path), _offset_of(length)
    if size >= 0 and number >= 0 and is_routed(number):
        _truncated(number, size, native_truncate, path, length)
        return
    if size >= 0 and number < 0 and writers:
        for inode in inodes_at(path):
            # By the rights of the path, not by those of a descriptor that happens to be open.
            if not native_access(path, os.W_OK, effective_ids=True):
                break
            try:
                status = native_stat(path)
            except OSError as error:
                if by_handler(error):
                    raise
                break
            fds = tuple(writers.get(inode, ()))
            if (status.st_dev, status.st_ino) == inode and fds:
                _truncated(fds[0], size, native_truncate, path, length)
                return
    if size >= 0 and number < 0 and _truncates_for_all(path, size):
        return
    native_truncate(path, length)


def _truncates_for_all(path: Any, size: int) -> bool:
    """Where another process may have the file open, its writes and this truncate have their order in the daemon alone."""
    try:
        location = os.fspath(path)
        if not is_concerned(location, True) or not S_ISREG(native_stat(location).st_mode):
            return False
    except (OSError, TypeError, ValueError):
        return False  # the native call says it better
    try:
        fd = open_descriptor(location, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (EMFILE, ENFILE):
            return False
        raise
    try:
        truncate_descriptor(fd, size, location)
    finally:
        close_descriptor(fd)
    return True


native_posix_fallocate = os.posix_fallocate


@hook("os", "posix")
def posix_fallocate(home: Home, fd: int, offset: int, length: int, /) -> None:
    number = descriptor(fd)
    start, size = _offset_of(offset), _offset_of(length)
    if start < 0 or size <= 0 or start + size > OFFSET_MAX or not is_routed(number):
        native_posix_fallocate(fd, offset, length)
        return
    result = elgate_fallocate(number, 0, start, size)
    if result == NATIVE:
        became_native(number)
        native_posix_fallocate(fd, offset, length)
    elif result < 0:
        raise os_error(result)


# --- Looking: what this process has written is applied first ---------------------------------------------------------

native_lseek = os.lseek
native_read = os.read
native_readv = os.readv
native_pread = os.pread
native_preadv = os.preadv


@hook("os", "posix")
def lseek(home: Home, fd: int, position: int, whence: int, /) -> int:
    number = fd if type(fd) is int else descriptor(fd)
    if number in tracked and (number in appending or whence not in (os.SEEK_SET, os.SEEK_CUR)):
        drain(number)
    return native_lseek(fd, position, whence)


@hook("os", "posix")
def read(home: Home, fd: int, length: int, /) -> bytes:
    number = fd if type(fd) is int else descriptor(fd)
    if number in tracked:
        drain(number)
    return native_read(fd, length)


@hook("os", "posix")
def readv(home: Home, fd: int, buffers: Any, /) -> int:
    drain(descriptor(fd))
    return native_readv(fd, buffers)


@hook("os", "posix")
def pread(home: Home, fd: int, length: int, offset: int, /) -> bytes:
    drain(descriptor(fd))
    return native_pread(fd, length, offset)


@hook("os", "posix")
def preadv(home: Home, fd: int, buffers: Any, offset: int, flags: int = 0, /) -> int:
    drain(descriptor(fd))
    return native_preadv(fd, buffers, offset, flags)


def _is_open(status: os.stat_result) -> bool:
    inode = (status.st_dev, status.st_ino)
    return inode in readers or bool(writers.get(inode))


@hook("os", "posix")
def stat(home: Home, path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
    status = native_stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
    if tracked and _is_open(status):
        _descriptors.drain_inode((status.st_dev, status.st_ino))
        status = native_stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
    return status


@hook("os", "posix")
def lstat(home: Home, path: Any, *, dir_fd: int | None = None) -> os.stat_result:
    status = native_lstat(path, dir_fd=dir_fd)
    if tracked and _is_open(status):
        _descriptors.drain_inode((status.st_dev, status.st_ino))
        status = native_lstat(path, dir_fd=dir_fd)
    return status


@hook("os", "posix")
def fstat(home: Home, fd: int) -> os.stat_result:
    drain(descriptor(fd))
    return native_fstat(fd)


# --- The kernel copies: what is read is drained, what is written to goes native ------------------------------------

native_sendfile = os.sendfile
native_copy_file_range = getattr(os, "copy_file_range", None)
native_splice = getattr(os, "splice", None)


def _kernel_copies(source: object, target: object) -> None:
    if tracked:
        drain(descriptor(source))
        go_native(descriptor(target), KERNEL_COPY)


@hook("os", "posix")
def sendfile(home: Home, out_fd: int, in_fd: int, offset: Any, count: int) -> int:
    _kernel_copies(in_fd, out_fd)
    return native_sendfile(out_fd, in_fd, offset, count)


@hook("os", "posix")
def copy_file_range(
    home: Home, src: int, dst: int, count: int, offset_src: int | None = None, offset_dst: int | None = None
) -> int:
    _kernel_copies(src, dst)
    return native_copy_file_range(src, dst, count, offset_src, offset_dst)  # type: ignore


@hook("os", "posix")
def splice(
    home: Home,
    src: int,
    dst: int,
    count: int,
    offset_src: int | None = None,
    offset_dst: int | None = None,
    flags: int = 0,
) -> int:
    _kernel_copies(src, dst)
    return native_splice(src, dst, count, offset_src, offset_dst, flags)  # type: ignore


# --- Names and attributes: drained, said, then native -----------------------------------------------------------------

native_rename = os.rename
native_replace = os.replace
native_unlink = os.unlink
native_remove = os.remove
native_link = os.link
native_utime = os.utime
native_chmod = os.chmod
native_fchmod = os.fchmod
native_chown = os.chown
native_fchown = os.fchown


@hook("os", "posix")
def rename(home: Home, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
    with NameChange(src, src_dir_fd, dst, dst_dir_fd):
        native_rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


@hook("os", "posix")
def replace(home: Home, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
    with NameChange(src, src_dir_fd, dst, dst_dir_fd):
        native_replace(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


@hook("os", "posix")
def unlink(home: Home, path: Any, *, dir_fd: int | None = None) -> None:
    with NameChange(path, dir_fd):
        native_unlink(path, dir_fd=dir_fd)


@hook("os", "posix")
def remove(home: Home, path: Any, *, dir_fd: int | None = None) -> None:
    with NameChange(path, dir_fd):
        native_remove(path, dir_fd=dir_fd)


@hook("os", "posix")
def link(
    home: Home,
    src: Any,
    dst: Any,
    *,
    src_dir_fd: int | None = None,
    dst_dir_fd: int | None = None,
    follow_symlinks: bool = True,
) -> None:
    if writers:
        # A file with two names cannot be told from another at replay.
        for inode in inodes_at(src, src_dir_fd):
            go_native_inode(inode, LINKED)
    with NameChange(src, src_dir_fd, dst, dst_dir_fd, replaces=False):
        native_link(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)


# A write that is applied later would set the time again, or take set-user-ID away.


@hook("os", "posix")
def utime(home: Home, path: Any, *arguments: Any, **options: Any) -> None:
    drain_path(path, options.get("dir_fd"))
    native_utime(path, *arguments, **options)


@hook("os", "posix")
def chmod(home: Home, path: Any, mode: int, **options: Any) -> None:
    drain_path(path, options.get("dir_fd"))
    native_chmod(path, mode, **options)


@hook("os", "posix")
def fchmod(home: Home, fd: int, mode: int) -> None:
    drain(descriptor(fd))
    native_fchmod(fd, mode)


@hook("os", "posix")
def chown(
    home: Home, path: Any, uid: int, gid: int, *, dir_fd: int | None = None, follow_symlinks: bool = True
) -> None:
    drain_path(path, dir_fd)
    native_chown(path, uid, gid, dir_fd=dir_fd, follow_symlinks=follow_symlinks)


@hook("os", "posix")
def fchown(home: Home, fd: int, uid: int, gid: int) -> None:
    drain(descriptor(fd))
    native_fchown(fd, uid, gid)


# --- Locks and flags -----------------------------------------------------------------------------------------------

native_fcntl = fcntl.fcntl
native_flock = fcntl.flock
native_ioctl = fcntl.ioctl
native_fcntl_lockf = fcntl.lockf
native_os_lockf = os.lockf
native_set_blocking = os.set_blocking

_DUPLICATE = {fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC}
# Which the state of the file does not matter to.
_OF_THE_DESCRIPTOR = {fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL}
# From linux/fs.h: FICLONE, FICLONERANGE, FIDEDUPERANGE. They write to the file without a write.
_CLONE = {0x40049409, 0x4020940D, 0xC0189436}


@hook("fcntl", name="fcntl")
def fcntl_fcntl(home: Home, fd: Any, cmd: int, arg: Any = 0, /) -> Any:
    number = descriptor_of(fd)
    if number not in tracked:
        result = native_fcntl(fd, cmd, arg)
        if tracked and cmd in _DUPLICATE and isinstance(result, int):
            replaced(result)
        return result
    if cmd in _OF_THE_DESCRIPTOR:
        return native_fcntl(fd, cmd, arg)
    if cmd in _DUPLICATE:
        copy = native_fcntl(fd, cmd, arg)
        duplicated(number, copy)
        return copy
    drain(number)
    if cmd == fcntl.F_SETFL:
        if _offset_of(arg) > 0 and descriptor(arg) & os.O_DIRECT:
            go_native(number, DIRECT)
        try:
            return native_fcntl(fd, cmd, arg)
        finally:
            _flags_changed(number)
    return native_fcntl(fd, cmd, arg)


def _flags_changed(number: int) -> None:
    """They belong to the open file: all duplicates share them, and there is no telling which those are."""
    for fd in tuple(writers.get(tracked.get(number, (0, 0)), ())):
        library.elgate_flags_changed(fd)
        try:
            flags = native_fcntl(fd, fcntl.F_GETFL)
        except OSError as error:
            if by_handler(error):
                raise
            replaced(fd)
            continue
        if flags & os.O_APPEND:
            appending.add(fd)
        else:
            appending.discard(fd)


@hook("fcntl")
def ioctl(home: Home, fd: Any, request: int, arg: Any = 0, mutate_flag: bool = True, /) -> Any:
    if tracked:
        number = descriptor_of(fd)
        drain(number)
        if descriptor(request) & 0xFFFFFFFF in _CLONE:
            drain_all()  # the source is named within `arg`
            go_native(number, KERNEL_COPY)
    return native_ioctl(fd, request, arg, mutate_flag)


@hook("fcntl")
def flock(home: Home, fd: Any, operation: int, /) -> None:
    drain(descriptor_of(fd))
    native_flock(fd, operation)


@hook("fcntl", name="lockf")
def fcntl_lockf(home: Home, fd: Any, cmd: int, len: int = 0, start: int = 0, whence: int = 0, /) -> Any:
    drain(descriptor_of(fd))
    return native_fcntl_lockf(fd, cmd, len, start, whence)


@hook("os", "posix", name="lockf")
def os_lockf(home: Home, fd: int, command: int, length: int, /) -> None:
    drain(descriptor(fd))
    native_os_lockf(fd, command, length)


@hook("os", "posix")
def set_blocking(home: Home, fd: int, blocking: bool, /) -> None:
    native_set_blocking(fd, blocking)
    number = descriptor(fd)
    if number in tracked:
        _flags_changed(number)


# --- Other programs: what they get at goes native --------------------------------------------------------------------

native_posix_spawn = os.posix_spawn
native_posix_spawnp = os.posix_spawnp
native_execv = os.execv
native_execve = os.execve
native_fork_exec = _posixsubprocess.fork_exec


def _spawns(options: dict[str, Any]) -> None:
    if writers:
        actions = options.get("file_actions")
        if not isinstance(actions, (list, tuple)):
            actions = ()  # none, or the native call will say so
        duplicates_made = [action[1] for action in actions if action[:1] == (os.POSIX_SPAWN_DUP2,)]
        pass_on(duplicates_made, True)


@hook("os", "posix")
def posix_spawn(home: Home, path: Any, argv: Any, env: Any, /, **options: Any) -> int:
    _spawns(options)
    return native_posix_spawn(path, argv, env, **options)


@hook("os", "posix")
def posix_spawnp(home: Home, path: Any, argv: Any, env: Any, /, **options: Any) -> int:
    _spawns(options)
    return native_posix_spawnp(path, argv, env, **options)


@hook("os", "posix")
def execv(home: Home, path: Any, argv: Any, /) -> Any:
    pass_on((), True)
    return native_execv(path, argv)


@hook("os", "posix")
def execve(home: Home, path: Any, argv: Any, env: Any) -> Any:
    pass_on((path,) if isinstance(path, int) else (), True)
    return native_execve(path, argv, env)


@hook("_posixsubprocess")
def fork_exec(home: Home, /, *arguments: Any) -> int:
    """What subprocess and multiprocessing start other programs with: after `args` and `executable_list` come
    close_fds, pass_fds, cwd, env, and six descriptors (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)."""
    if writers:
        close_fds, pass_fds = arguments[2], arguments[3]
        pass_on({0, 1, 2, *pass_fds, *arguments[6:12]}, not close_fds)
    return native_fork_exec(*arguments)


native_exit = os._exit
# What ends so ends at once: it waits for a daemon that works, not for one that has yet to come back.
_EXIT_LIMIT_MS = 5000


@hook("os", "posix")
def _exit(home: Home, status: int) -> Any:
    """How forked children end. Who waits for them shall see what they have written."""
    if writers:
        library.elgate_drain_all_within(_EXIT_LIMIT_MS)
    return native_exit(status)


native_sendmsg = socket.socket.sendmsg


def socket_sendmsg(self: socket.socket, *arguments: Any) -> int:
    """socket.socket.sendmsg, and so socket.send_fds: descriptors that are sent go native."""
    if len(arguments) > 1 and writers:
        ancillary = list(arguments[1])
        arguments = (arguments[0], ancillary, *arguments[2:])
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = memoryview(data).cast("B")
                for fd in numbers[: len(numbers) // 4 * 4].cast("i"):
                    go_native(fd, PASSED_ON)
    return native_sendmsg(self, *arguments)


for detail in ("__name__", "__qualname__", "__doc__"):
    setattr(socket_sendmsg, detail, getattr(native_sendmsg, detail))


# --- Mappings --------------------------------------------------------------------------------------------------------

native_mmap = mmap.mmap


class _MmapType(type):
    """Mappings made before the patch, and those made under it, are instances of both."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, native_mmap) if cls is RoutedMmap else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, native_mmap) if cls is RoutedMmap else super().__subclasscheck__(subclass)


class RoutedMmap(native_mmap, metaclass=_MmapType):
    """mmap.mmap, before which the file goes native: a mapping is read and written without any call."""

    __slots__ = ()

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        go_native(descriptor(arguments[0] if arguments else options.get("fileno")), MAPPED)
        return native_mmap.__new__(native_mmap if cls is RoutedMmap else cls, *arguments, **options)


for detail in ("__module__", "__name__", "__qualname__", "__doc__"):
    setattr(RoutedMmap, detail, getattr(native_mmap, detail))
hooks["mmap", "mmap"] = RoutedMmap
originals["mmap", "mmap"] = native_mmap
