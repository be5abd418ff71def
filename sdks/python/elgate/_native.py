"""The client library: finding it, and what its answers mean.

No function, structure or constant is written down a second time here: the build makes `_client_declarations` from
elgate_client.h, with cffi. Importing this module loads the library; nothing connects before `start`.
"""

from __future__ import annotations

import atexit
import os
import sys
from errno import EINTR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_LIBRARY = os.path.join(_PACKAGE, "libelgate_client.so")
_DECLARATIONS = os.path.join(_PACKAGE, "_client_declarations.py")


def _load() -> tuple[Any, Any]:
    missing = [path for path in (_LIBRARY, _DECLARATIONS) if not os.path.exists(path)]
    if missing:
        raise ImportError(
            f"elgate: {' and '.join(missing)} missing: the native parts of this installation were not built. "
            "Install the package (pip install elgate), or run `make build` in a source tree."
        )
    from elgate._client_declarations import ffi

    return ffi, ffi.dlopen(_LIBRARY)


ffi, library = _load()

# The memory of a buffer as `const void *`, without a copy.
from_buffer: Callable[[Any], Any] = ffi.from_buffer

NATIVE: int = library.ELGATE_NATIVE
LEVELS: dict[str, int] = {
    name: getattr(library, "ELGATE_" + name.upper()) for name in ("accepted", "logged", "durable", "applied")
}
LEVEL_NAMES: dict[int, str] = {number: name for name, number in LEVELS.items()}


def answering(function: Callable[..., int]) -> Callable[..., int]:
    """`function` of the library, called again for as long as signals end its waits. Python runs their handlers in
    between; one that raises ends it."""

    def call(*arguments: Any) -> int:
        while True:
            result = function(*arguments)
            if result != -EINTR:
                return result

    return call


_started = False
_watching_process = False


def os_error(result: int, filename: object = None) -> OSError:
    """The exception that the operating system's call would have raised for `result` (-errno)."""
    number = -result
    if filename is None:
        return OSError(number, os.strerror(number))
    return OSError(number, os.strerror(number), filename)


def by_handler(error: BaseException) -> bool:
    """Whether a signal handler of the program has raised `error`, and not the call in the `try`, which is written in
    C and has no frame of its own. Python runs handlers between bytecodes, so that theirs come out anywhere."""
    traceback = error.__traceback__
    return traceback is not None and traceback.tb_next is not None


def start() -> bool:
    """Connects, once per process. True: connected; False: everything stays native (ELGATE_DISABLE=1, or there is no
    daemon and the library has said so).

    OSError: no daemon, and ELGATE_FALLBACK is `fail`, or `wait` and the wait is over."""
    global _started, _watching_process
    if not _started:
        library.elgate_answer_signals()
        result = answering(library.elgate_start)(b"python")
        if result < 0:
            socket = os.environ.get("ELGATE_SOCKET")
            raise OSError(
                -result,
                f"elgate: cannot connect to the daemon{f' at {socket}' if socket else ''} ({os.strerror(-result)}), and "
                f"ELGATE_FALLBACK={os.environ.get('ELGATE_FALLBACK', '')} forbids going on without it: "
                "start it (elgate daemon), or set ELGATE_SOCKET to its control socket",
            )
        if not _watching_process:
            _watching_process = True
            os.register_at_fork(before=library.elgate_before_fork, after_in_child=library.elgate_after_fork_in_child)
            # Runs when all threads but daemon threads have ended.
            atexit.register(_drain_at_exit)
        _started = result == 1
    return _started


def stop() -> None:
    """Drains all, and ends the session: the next `start` looks for a daemon anew. OSError: what could not be applied."""
    global _started
    if not _started:
        return
    _started = False
    result = answering(library.elgate_stop)()
    if result < 0 and result != NATIVE:
        raise os_error(result)


# What is to be done before the last drain.
before_exit: list[Callable[[], None]] = []


def _drain_at_exit() -> None:
    """The end of a process is a close of all its files: the next program shall see what they were given."""
    for function in before_exit:
        function()
    result = answering(library.elgate_drain_all)()
    if result < 0 and result != NATIVE:
        print(
            f"elgate: at exit: pending writes could not be applied: {os.strerror(-result)}. They are in the ring or "
            "the log; the daemon applies them when it can (see its log).",
            file=sys.stderr,
        )


def status() -> dict[str, int]:
    """The client's counters, by the names that the header gives them."""
    block = ffi.new("struct elgate_client_status *")
    library.elgate_get_status(block)
    return {name: int(getattr(block, name)) for name, _ in ffi.typeof("struct elgate_client_status").fields}
