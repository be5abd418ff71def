"""Runs a program that knows nothing of Elgate, with its files hooked from its first line on.

    python -m elgate.run program.py [argument ...]
    python -m elgate.run -m module [argument ...]
    python -m elgate.run -c code [argument ...]

The program finds what it would find without `-m elgate.run`: itself as `__main__`, its own sys.argv and sys.path[0],
only its own frames in a traceback. Exit codes, signals and atexit are left to the interpreter.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType, TracebackType

import elgate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

USAGE = "usage: python -m elgate.run [-m module | -c code | program.py | directory | archive.zip | -] [argument ...]"

# This file is `__main__` until the program is, and must outlive that.
_self = sys.modules["__main__"]


def main(arguments: list[str]) -> None:
    """Runs the program; what it raises comes out. SystemExit(2) for wrong arguments."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        raise SystemExit(0)
    if not arguments:
        _refuse("which program?")
    first, rest = arguments[0], arguments[1:]
    option = first[:2]
    if option in ("-m", "-c"):
        operand = first[2:]
        if not operand:
            if not rest:
                _refuse(f"argument expected for the {option} option")
            operand, rest = rest[0], rest[1:]
        elgate.patch_all()
        if option == "-m":
            _run_module(operand, rest)
        else:
            _run_code(operand, rest)
    elif option == "-" or not first.startswith("-"):
        elgate.patch_all()
        _run_path(first, rest)
    else:
        _refuse(f"unknown option {first}; options of the interpreter stand before -m elgate.run")


def _refuse(message: str) -> NoReturn:
    print(f"elgate.run: {message}\n{USAGE}", file=sys.stderr)
    raise SystemExit(2)


def _run_module(name: str, arguments: list[str]) -> None:
    _become_main(None, None)
    sys.argv[:] = ["-m", *arguments]
    # What the interpreter itself calls for -m. It puts the module's file into sys.argv[0].
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _run_code(source: str, arguments: list[str]) -> None:
    sys.argv[:] = ["-c", *arguments]
    _search_first("")
    if sys.version_info >= (3, 13):
        import linecache

        # Where tracebacks find its lines.
        lines = [line + "\n" for line in source.splitlines()]
        linecache.cache["<string>"] = (len(source), None, lines, "<string>")
    _execute(compile(source, "<string>", "exec", dont_inherit=True), None, BuiltinImporter)


def _run_path(path: str, arguments: list[str]) -> None:
    from pkgutil import get_importer

    sys.argv[:] = [path, *arguments]
    if path == "-":
        _search_first("")
        source = sys.stdin.buffer.read()
        _execute(compile(source, "<stdin>", "exec", dont_inherit=True), "<stdin>", BuiltinImporter)
    elif get_importer(path) is not None:
        # A directory or an archive, with a __main__.py. It is searched first in every mode of the interpreter.
        _search_first(_located(path), always=True)
        _become_main(None, None)
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
    else:
        _search_first(os.path.dirname(os.path.realpath(path)))
        location = _located(path)
        code, loader = _load(location)
        _execute(code, location, loader)


def _located(path: str) -> str:
    """Absolute as the interpreter makes it: without a look at what the components are."""
    return os.path.join(os.getcwd(), path)


def _load(path: str) -> tuple[CodeType, Any]:
    try:
        if path.endswith(".pyc"):
            bare = SourcelessFileLoader("__main__", path)
            code = bare.get_code("__main__")
            assert code is not None
            return code, bare
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        print(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    return compile(source, path, "exec", dont_inherit=True), SourceFileLoader("__main__", path)


def _search_first(entry: str, always: bool = False) -> None:
    """`python -m` has put the working directory first in sys.path, unless it was told not to trust such places."""
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = entry
    elif always:
        sys.path.insert(0, entry)


def _become_main(file: str | None, loader: Any) -> dict[str, Any]:
    """A `__main__` as the interpreter has it before a program begins."""
    module = ModuleType("__main__")
    namespace = module.__dict__
    namespace["__builtins__"] = sys.modules["builtins"]
    namespace["__loader__"] = loader
    if sys.version_info < (3, 14):
        namespace["__annotations__"] = {}
    if file is not None:
        namespace["__file__"] = file
        namespace["__cached__"] = None
    sys.modules["__main__"] = module
    return namespace


def _execute(code: CodeType, file: str | None, loader: Any) -> None:
    exec(code, _become_main(file, loader))


def _without_own_frames(traceback: TracebackType | None) -> TracebackType | None:
    own = main.__code__.co_filename
    starter = runpy.run_path.__code__.co_filename
    rest = traceback
    while traceback is not None and traceback.tb_frame.f_code.co_filename in (own, starter):
        if traceback.tb_frame.f_code.co_filename == own:
            rest = traceback.tb_next
        traceback = traceback.tb_next
    return rest


def _show_own_frames_not() -> None:
    """The exception goes on to the interpreter, which knows all about exit codes; only what is shown is shortened."""
    show = sys.excepthook

    def shortened(kind: Any, error: BaseException, traceback: TracebackType | None) -> None:
        sys.excepthook = show
        traceback = _without_own_frames(traceback)
        show(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = shortened


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SystemExit:
        raise
    except BaseException:
        _show_own_frames_not()
        raise
