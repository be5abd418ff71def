"""Elgate makes the files of an unchanged program durable, at memory speed.

    import elgate
    elgate.patch_all()          # first of all, before other imports

From then on `open`, `os.write`, `os.fsync` and their like work through the daemon for files on its routes, and are
the operating system's own for all others. A program that shall not be touched at all is started with
`python -m elgate.run program.py`.

Without a daemon everything stays native (ELGATE_FALLBACK: passthrough, wait or fail). ELGATE_DISABLE=1 hooks nothing.
"""

from __future__ import annotations

import importlib
import os
import sys

# As type checkers know it. Each program waits for what is imported here: typing is needed by them alone, in all modules.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from elgate._append import Ack

# In a source tree elgate.daemon lies in a folder of its own.
if not os.path.isdir(os.path.join(__path__[0], "daemon")):
    __path__.extend(
        folder
        for folder in (os.path.join(entry, "elgate") for entry in sys.path)
        if folder not in __path__ and os.path.isdir(folder)
    )

__all__ = ["Ack", "append", "close", "original", "patch_all", "status", "unpatch_all"]

# The modules behind these functions load the native library, so they are imported on first use: `import elgate`
# alone costs nothing, and with ELGATE_DISABLE=1 there need be no library.


def patch_all() -> bool:
    """Hooks the file functions, once per process: first of all, before other threads and imports.

    True: connected to a daemon. False: ELGATE_DISABLE=1 (nothing is hooked), or there is no daemon and
    ELGATE_FALLBACK=passthrough (one line on stderr says so, and files stay native, except that one which still has
    records in a daemon's log refuses to open). RuntimeWarning: names modules that imported what is replaced before.
    OSError: no daemon, and ELGATE_FALLBACK forbids going on without. ImportError: the native library is missing."""
    if _is_disabled():
        return False
    from elgate import _native, _patch

    connected = _native.start()
    _patch.install(connected, stacklevel=2)
    return connected


def _is_disabled() -> bool:
    """As the client library reads it."""
    value = os.environ.get("ELGATE_DISABLE", "")
    if value.lower() in ("", "0", "false", "no"):
        return False
    if value.lower() not in ("1", "true", "yes"):
        text = f'elgate: ELGATE_DISABLE is "{value}"; it may be 1, true or yes, or 0, false or no. Taken as yes'
        print(text, file=sys.stderr)
    return True


def unpatch_all() -> None:
    """Takes the hooks back. Files that are open and routed are drained and go native; OSError (the first) where one
    cannot, with all functions restored nevertheless. Any thread, when no other opens or closes files."""
    patch = sys.modules.get("elgate._patch")
    if patch is not None:
        patch.uninstall()


def original(name: str) -> Any:
    """What `name` would be without Elgate: original("os.write"). AttributeError if there is no such thing."""
    patch = sys.modules.get("elgate._patch")
    if patch is not None:
        return patch.original(name)
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def append(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], data: Any) -> Ack:
    """Appends `data` (bytes, or what has a buffer) to the file at `path`, which is on a route, and returns at once;
    one append is never torn apart by others. `ack.wait("durable")` waits for it.

    The file is created if need be, and stays open until `close()` or the end of the process: after a rotation, call
    `close()`. Any thread; needs no patch_all. Without a daemon the append is native, and "durable" an fsync.
    ValueError: on no route. OSError: that of open or write; EMSGSIZE where `data` is above a quarter of the ring, which
    is 1 MiB with its header."""
    from elgate import _append

    return _append.append(path, data)


def close() -> None:
    """Closes what `append` has opened, once all of it is applied. The next append opens anew. OSError: the first."""
    module = sys.modules.get("elgate._append")
    if module is not None:
        module.close()


def status() -> dict[str, Any]:
    """Whether the process is `patched`, and the client's counters since it began (names as in elgate_client.h)."""
    from elgate import _native

    patch = sys.modules.get("elgate._patch")
    return {"patched": patch is not None and patch.patched(), **_native.status()}


def __getattr__(name: str) -> Any:
    if name == "Ack":
        from elgate._append import Ack

        return Ack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
