"""What `open` returns for a file on a route: the ordinary buffered and text layers over this module's FileIO.

**The idiom `for result in map(function, …): return result`.** The layers above are written in C and keep count by
what `write`, `readinto` and `seek` return. Python runs signal handlers between bytecodes, also right behind a call,
and where one raises (KeyboardInterrupt), the count of a call that has done its work is lost: a buffer would be
written a second time when the file is closed. A `for` calls its iterator and stores the result without such a gap
(in CPython 3.10 and later), so that a call has either not begun or is counted.
"""

from __future__ import annotations

import io
import operator
import os
import sys
import warnings
import weakref
from errno import EAGAIN, EINTR

from elgate import _descriptors
from elgate._descriptors import (
    UNPATCHED,
    appending,
    became_native,
    descriptor,
    drain,
    duplicates,
    elgate_ftruncate,
    forget,
    is_concerned,
    is_routed,
    open_descriptor,
    proven,
    routed,
    tracked,
)
from elgate._native import NATIVE, before_exit, by_handler, from_buffer, library, os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Union

    File = Union[str, bytes, int, os.PathLike[Any]]
    Opener = Callable[[Any, int], int]

native_file_close = io.FileIO.close
native_file_read = io.FileIO.read
native_file_readall = io.FileIO.readall
native_file_readinto = io.FileIO.readinto
native_file_seek = io.FileIO.seek
native_file_tell = io.FileIO.tell
native_file_truncate = io.FileIO.truncate
native_file_write = io.FileIO.write
native_io_open = io.open
native_set_inheritable = os.set_inheritable
native_write = os.write

elgate_write = library.elgate_write

_WRITING = frozenset("wax+")
OFFSET_MAX = (1 << 63) - 1


def memory_of(data: Any) -> Any:
    """The memory of an object other than bytes, without a copy. Raises what the native call would."""
    try:
        return from_buffer(data)
    except (TypeError, BufferError, ValueError) as error:
        if by_handler(error):
            raise
    try:
        # Looks at its arguments first, and can do no more than that.
        native_write(-1, data)
    except OSError as error:
        if by_handler(error):
            raise
    return from_buffer(memoryview(data).tobytes())


class FileIO(io.FileIO):
    """io.FileIO that writes through Elgate where its descriptor is routed, and is io.FileIO where it is not."""

    # -1: closed, or not open for writing; never a routed number.
    _descriptor = -1
    _write_descriptor = -1

    def __init__(self, file: File, mode: str = "r", closefd: bool = True, opener: Opener | None = None) -> None:
        error = None
        if self._descriptor in tracked and self.closefd:
            error = forget(self._descriptor)
        self._descriptor = self._write_descriptor = -1
        if opener is None and isinstance(file, (str, bytes)) and is_concerned(file, _writes(mode)):
            opener = _open_created_as_open_does
        super().__init__(file, mode, closefd, opener)
        self._descriptor = self.fileno()
        if self.writable():
            self._write_descriptor = self._descriptor
        if error is not None:
            raise error

    def __repr__(self) -> str:
        # Warnings about files that nobody closed show it. From 3.13 on the class of the object stands there.
        text = super().__repr__()
        return text.replace("<FileIO ", "<_io.FileIO ", 1) if type(self) is FileIO else text

    def write(self, data: Any, /) -> int | None:  # type: ignore[override,unused-ignore]
        fd = self._write_descriptor
        if fd not in routed and not (fd in duplicates and proven(fd)):
            return native_file_write(self, data)
        memory = data if type(data) is bytes else memory_of(data)
        count = -EINTR
        while count == -EINTR:
            for count in map(elgate_write, (fd,), (memory,), (len(memory),)):
                if count >= 0:
                    return count
        if count == NATIVE:
            became_native(fd)
            return native_file_write(self, data)
        if count == -EAGAIN:
            return None
        raise os_error(count)

    def readinto(self, buffer: Any, /) -> int | None:
        drain(self._descriptor)
        for count in map(native_file_readinto, (self,), (buffer,)):
            return count
        raise AssertionError

    def read(self, size: Any = -1, /) -> bytes | None:  # type: ignore[override]
        drain(self._descriptor)
        for data in map(native_file_read, (self,), (size,)):
            return data
        raise AssertionError

    def readall(self) -> bytes | None:  # type: ignore[override]
        drain(self._descriptor)
        for data in map(native_file_readall, (self,)):
            return data
        raise AssertionError

    def seek(self, pos: Any, whence: Any = 0, /) -> int:
        fd = self._descriptor
        if fd in tracked and (fd in appending or whence not in (os.SEEK_SET, os.SEEK_CUR)):
            drain(fd)
        for offset in map(native_file_seek, (self,), (pos,), (whence,)):
            return offset
        raise AssertionError

    def tell(self) -> int:
        fd = self._descriptor
        if fd in appending:
            drain(fd)
        for offset in map(native_file_tell, (self,)):
            return offset
        raise AssertionError

    def truncate(self, size: Any = None, /) -> int:
        fd = self._write_descriptor
        if not is_routed(fd):
            return native_file_truncate(self, size)
        if size is None:
            size = self.tell()
        try:
            length = operator.index(size)
        except TypeError:
            length = -1
        if not 0 <= length <= OFFSET_MAX:
            return native_file_truncate(self, size)  # raises
        result = elgate_ftruncate(fd, length)
        if result == NATIVE:
            became_native(fd)
            return native_file_truncate(self, size)
        if result < 0:
            raise os_error(result)
        return size  # type: ignore[no-any-return]

    def close(self) -> None:
        fd = self._descriptor
        if fd not in tracked or not self.closefd:
            self._descriptor = self._write_descriptor = -1
            native_file_close(self)
            return
        try:
            error = forget(fd)
        finally:
            self._descriptor = self._write_descriptor = -1
            native_file_close(self)
        if error is not None:
            raise error


def _writes(mode: object) -> bool:
    return isinstance(mode, str) and not _WRITING.isdisjoint(mode)


def _open_created_as_open_does(path: Any, flags: int) -> int:
    return open_descriptor(path, flags, 0o666)


class _Taken(BaseException):
    """Out of a native `open`: the descriptor has to do with Elgate."""


class _Taker:
    """The opener that lets the native `open` check all its arguments, in its own order and words, before anything is
    opened; and that lets it have what turns out to be native."""

    def __init__(self, opener: Opener | None, fd: int = -1) -> None:
        self._opener = opener
        self.fd = fd

    def __call__(self, path: Any, flags: int) -> int:
        if self.fd < 0:
            opener = self._opener
            fd = open_descriptor(path, flags, 0o666) if opener is None else opener(path, flags)
            if descriptor(fd) not in tracked:
                return fd
            if opener is not None:
                native_set_inheritable(fd, False)
            self.fd = descriptor(fd)
        raise _Taken


# io.text_encoding came together with the flag.
_warns_of_default_encoding = bool(getattr(sys.flags, "warn_default_encoding", False))


def routed_open(
    home: object,
    file: File,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Opener | None = None,
) -> Any:
    """The hook of builtins.open and io.open."""
    # Warnings are for the caller's line, not for this one.
    if _warns_of_default_encoding and encoding is None and isinstance(mode, str) and "b" not in mode:
        encoding = io.text_encoding(encoding, 2)
    if buffering == 1 and isinstance(mode, str) and "b" in mode:
        warnings.warn(
            "line buffering (buffering=1) isn't supported in binary mode, the default buffer size will be used",
            RuntimeWarning,
            2,
        )
        buffering = -1

    taker = None
    if _descriptors.mode != UNPATCHED:
        if not isinstance(file, (str, bytes)) and hasattr(type(file), "__fspath__"):
            file = os.fspath(file)  # type: ignore[arg-type]
        if isinstance(file, (str, bytes)):
            if opener is not None or is_concerned(file, _writes(mode)):
                taker = _Taker(opener)
        elif descriptor(file) in tracked:
            taker = _Taker(None, descriptor(file))
    if taker is None:
        return native_io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)

    is_path = taker.fd < 0
    path = file if is_path else f"/proc/self/fd/{taker.fd}"
    try:
        return native_io_open(path, mode, buffering, encoding, errors, newline, closefd if is_path else True, taker)
    except _Taken:
        pass
    return _layers(taker.fd, file, mode, buffering, encoding, errors, newline, closefd)


def _layers(
    fd: int,
    name: File,
    mode: str,
    buffering: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
    closefd: bool,
) -> Any:
    """What the native `open` does once it has the descriptor of a regular file. `mode` and `buffering` are checked."""
    raw_mode = "".join(letter for letter in mode.replace("U", "r") if letter in "rwax+")
    try:
        drain(fd)  # mode "a" asks for the end of the file
        raw = FileIO(fd, raw_mode, closefd)
    except BaseException:
        if isinstance(name, (str, bytes)):
            _descriptors.close_descriptor(fd)
        raise
    raw.name = name
    result: Any = raw
    try:
        line_buffering = buffering == 1
        if buffering < 0 or line_buffering:
            buffering = raw._blksize  # type: ignore[attr-defined]
        binary = "b" in mode
        if buffering == 0:
            if not binary:
                raise ValueError("can't have unbuffered text I/O")
            return raw
        if "+" in raw_mode:
            result = io.BufferedRandom(raw, buffering)
        elif raw_mode == "r":
            result = io.BufferedReader(raw, buffering)
        else:
            result = io.BufferedWriter(raw, buffering)
        if not binary:
            result = io.TextIOWrapper(result, encoding, errors, newline, line_buffering)
            result.mode = mode
    except BaseException:
        result.close()
        raise
    _open_files.add(result)
    return result


# What nobody has closed at the end of the process is flushed while Python is still whole: the natives are finalized
# by C code, this module's FileIO by functions whose module may be gone by then.
_open_files: weakref.WeakSet[Any] = weakref.WeakSet()


def _flush_all() -> None:
    for file in list(_open_files):
        try:
            file.flush()
        except (OSError, ValueError):
            pass  # closed already, or it fails once more when it is finalized, which is told then


before_exit.append(_flush_all)
