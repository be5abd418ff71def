"""Putting the hooks in place of the functions that they stand for, and taking them back."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
import warnings
from types import ModuleType

from elgate import _descriptors
from elgate._hooks import hooks, native_sendmsg, originals, socket_sendmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# Sets of functions by which programs ask what a function of os can do.
_CAPABILITIES = ("supports_dir_fd", "supports_effective_ids", "supports_fd", "supports_follow_symlinks")

# Modules of the standard library that keep functions of os in a class. Its module globals are all taken care of;
# other places where it keeps originals are without harm: tempfile's default argument (unlink, of a file that is
# closed), multiprocessing.connection (pipes and sockets only), glob (lstat, whether a name exists).
_CLASSES = (("pathlib", "_NormalAccessor"),)

_lock = threading.Lock()
_patched = False
# What was replaced: the owner, the attribute, and the very object that stood there.
_replaced: list[tuple[Any, str, Any]] = []


def patched() -> bool:
    return _patched


def install(connected: bool, stacklevel: int) -> None:
    """Idempotent. Any thread; best before there are others."""
    global _patched
    with _lock:
        if _patched:
            return
        _patched = True
        for (module, name), hook in hooks.items():
            _set(importlib.import_module(module), name, hook)
        _exchange_capabilities({original: hooks[key] for key, original in originals.items()})
        socket.socket.sendmsg = socket_sendmsg  # type: ignore
        late = []
        # Twins (os.write, posix.write) are called by the name that comes first.
        hook_of = {id(original): (key, hooks[key]) for key, original in reversed(originals.items())}
        for holder, name, value in _holders(hook_of):
            key, hook = hook_of[id(value)]
            if isinstance(holder, type) or _is_standard_library(holder.__name__):
                _set(holder, name, hook)
            else:
                late.append(f"{holder.__name__}.{name} ({'.'.join(key)})")
        _descriptors.mode = _descriptors.ROUTES if connected else _descriptors.MARKS
    if late:
        warnings.warn(
            f"elgate.patch_all() came after these had been imported: {', '.join(sorted(late))}. They stay native, so "
            "that what they write to files on a route is not protected, and not in order with what goes through "
            "Elgate. Call patch_all() first, or start the program with `python -m elgate.run`.",
            RuntimeWarning,
            stacklevel + 1,
        )


def uninstall() -> None:
    """Idempotent. Routed files go native; OSError where that fails, but the functions are restored in any case."""
    global _patched
    with _lock:
        if not _patched:
            return
        _descriptors.mode = _descriptors.UNPATCHED
        try:
            _descriptors.release_all()
        finally:
            for owner, name, previous in reversed(_replaced):
                if getattr(owner, name, None) == _hook_for(previous):
                    setattr(owner, name, previous)
            _replaced.clear()
            _exchange_capabilities({hooks[key]: original for key, original in originals.items()})
            if vars(socket.socket).get("sendmsg") is socket_sendmsg:
                delattr(socket.socket, "sendmsg")
            # Modules imported meanwhile.
            original_of = {id(hook): originals[key] for key, hook in hooks.items()}
            for holder, name, value in _holders(original_of):
                setattr(holder, name, original_of[id(value)])
            _patched = False


def original(name: str) -> Any:
    """What `name` ("os.write") would be without Elgate."""
    module, _, attribute = name.rpartition(".")
    if (module, attribute) in originals:
        return originals[module, attribute]
    if name == "socket.socket.sendmsg":
        return native_sendmsg
    value = getattr(importlib.import_module(module), attribute)
    return next((originals[key] for key, hook in hooks.items() if hook is value), value)


def _set(owner: Any, name: str, value: Any) -> None:
    _replaced.append((owner, name, vars(owner)[name]))
    setattr(owner, name, value)


def _hook_for(previous: Any) -> Any:
    function = previous.__func__ if isinstance(previous, staticmethod) else previous
    for key, original in originals.items():
        if original is function:
            return hooks[key]
    return None


def _exchange_capabilities(exchange: dict[Any, Any]) -> None:
    for name in _CAPABILITIES:
        functions = getattr(os, name)
        for function, substitute in exchange.items():
            if function in functions:
                functions.remove(function)
                functions.add(substitute)


def _holders(wanted: dict[int, Any]) -> Iterator[tuple[Any, str, Any]]:
    """Who holds one of the `wanted` objects by a name: modules, and the classes of `_CLASSES`."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or _is_own(module.__name__):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in wanted:
                yield module, name, value
    for module_name, class_name in _CLASSES:
        holder = getattr(sys.modules.get(module_name), class_name, None)
        for name, value in list(vars(holder).items()) if holder is not None else ():
            function = value.__func__ if isinstance(value, staticmethod) else value
            if id(function) in wanted:
                yield holder, name, function


def _is_own(module_name: str) -> bool:
    """This package calls the originals on purpose."""
    return module_name == "elgate" or module_name.startswith("elgate._")


def _is_standard_library(module_name: str) -> bool:
    top = module_name.partition(".")[0]
    names = getattr(sys, "stdlib_module_names", None)
    if names is not None:
        return top in names
    # Python 3.9
    path = getattr(sys.modules.get(top), "__file__", None)
    if path is None:
        return top in sys.builtin_module_names
    library = os.path.dirname(os.__file__) + os.sep
    return path.startswith(library) and f"{os.sep}site-packages{os.sep}" not in path
