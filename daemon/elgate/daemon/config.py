"""The daemon's configuration: one YAML file, read into named tuples, or embedded defaults.

Every problem of a file is found in one pass and reported as `file:line: field: what is wrong, what is allowed`.
That is why this walks PyYAML's *nodes*, which know their line, and not the plain dictionaries that a schema library
validates (docs/dependencies.md has the comparison). Reading has no side effect; `prepare_directories` has.
"""

from __future__ import annotations

import functools
import grp
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from elgate.daemon import places

FILE_BYTES_MAX = 1 << 20
ROUTES_MAX = 1024
PATTERN_BYTES_MAX = 4096
# sockaddr_un.sun_path, less the terminator.
SOCKET_PATH_BYTES_MAX = 107
MIB = 1 << 20
SEGMENT_BYTES_MIN = 8 * MIB
SEGMENT_BYTES_MAX = 1024 * MIB
# ELGATE_FLUSH_INTERVAL_MS_MAX.
FLUSH_INTERVAL_MS_MAX = 60_000

ROUTE_NAME = re.compile(r"[a-z0-9_-]{1,64}")
SIZE = re.compile(r"(\d{1,18})\s*(B|KiB|MiB|GiB|TiB)?")
SIZE_UNITS = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": MIB, "GiB": 1 << 30, "TiB": 1 << 40}
DURATION = re.compile(r"(\d{1,12})\s*(ms|s|min|h|d)")
DURATION_UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
# The engine holds intervals in 32 bits of milliseconds, which are 49.7 days, and sizes in file offsets.
DURATION_MS_MAX = 49 * 86_400_000
AGE_MS_MAX = 3650 * 86_400_000
SIZE_BYTES_MAX = 1024 << 40
PERMISSIONS = re.compile(r"(0o?)?([0-7]{3})")
# Wildcards of other globs, which are none here.
NOT_WILDCARDS = "[]{}\\"

TEST_STUB = "test_stub"
# Behind the names of a test stub's own ring, log and table.
STUB_SUFFIX = ".stub"


class Problem(NamedTuple):
    """One thing that is wrong, and where."""

    source: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}" if self.line else self.source
        return f"{where}: {self.field}: {self.message}" if self.field else f"{where}: {self.message}"


class ConfigurationError(Exception):
    """All problems of one configuration, in the order of their lines; `str()` gives one line for each."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class Runtime(NamedTuple):
    mode: str = "auto"
    shards: str | int = "auto"


class Control(NamedTuple):
    socket: Path
    mode: int = 0o660
    group: str | None = None
    gid: int = -1


class Ring(NamedTuple):
    path: Path
    isolation: str = "per_uid"


class Wal(NamedTuple):
    dir: Path
    segment_bytes: int = 64 * MIB
    max_bytes: int = 4096 * MIB
    # How long log segments are kept that a checkpoint has passed; 0: not at all.
    max_age_ms: int = 0
    # How far behind the log the target files may be synced; a replay does what lies between again.
    checkpoint_interval_ms: int = 5_000
    allow_volatile: bool = False


class Disk(NamedTuple):
    # What writes the target files: a thread per file system, or io_uring. docs/benchmarks.md compares them.
    engine: str = "threads"


class Test(NamedTuple):
    """For benchmarks and tests: what a daemon that should keep data safe must never have."""

    # Records are checked and dropped, to measure the ring alone.
    null_sink: bool = False

    def switched_on(self) -> list[str]:
        return [name for name, value in self._asdict().items() if value]


class Route(NamedTuple):
    name: str
    # As the engine matches it: the part before the first wildcard with its symlinks resolved.
    pattern: str
    pattern_as_written: str
    # When records become durable that nobody waits for: group, always, interval or none.
    flush: str = "group"
    # interval only.
    flush_interval_ms: int = 0
    visibility: str = "deferred"
    on_full: str = "block"


class Config(NamedTuple):
    source: str
    runtime: Runtime
    control: Control
    ring: Ring
    wal: Wal
    routes: tuple[Route, ...] = ()
    disk: Disk = Disk()
    test: Test = Test()
    # Line of each field that stands in the file, for errors that are found only later.
    lines: Mapping[str, int] = {}

    @property
    def is_stub(self) -> bool:
        """Nothing is durable: see elgate.daemon.stub."""
        return self.runtime.mode == TEST_STUB

    def problem(self, field_name: str, message: str) -> Problem:
        return Problem(self.source, self.lines.get(field_name, 0), field_name, message)

    def as_document(self) -> dict[str, Any]:
        """The effective configuration in the file's own terms: `load` of its YAML gives an equal one."""
        control: dict[str, Any] = {"socket": str(self.control.socket), "mode": f"{self.control.mode:04o}"}
        if self.control.group is not None:
            control["group"] = self.control.group
        document = {
            "version": 1,
            "runtime": {"mode": self.runtime.mode, "shards": self.runtime.shards},
            "control": control,
            "ring": {"path": str(self.ring.path), "isolation": self.ring.isolation},
            "wal": {
                "dir": str(self.wal.dir),
                "segment_size": format_size(self.wal.segment_bytes),
                "max_size": format_size(self.wal.max_bytes),
                "max_age": format_duration(self.wal.max_age_ms),
                "checkpoint_interval": format_duration(self.wal.checkpoint_interval_ms),
                "allow_volatile": self.wal.allow_volatile,
            },
            "disk": {"engine": self.disk.engine},
            "routes": [
                {
                    "name": route.name,
                    "match": {"path": route.pattern},
                    "flush": {"interval": format_duration(route.flush_interval_ms)}
                    if route.flush == "interval"
                    else route.flush,
                    "visibility": route.visibility,
                    "on_full": route.on_full,
                }
                for route in self.routes
            ],
        }
        if self.test.switched_on():
            document["test"] = dict.fromkeys(self.test.switched_on(), True)
        return document


def format_size(size_bytes: int) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % SIZE_UNITS[unit] == 0:
            return f"{size_bytes // SIZE_UNITS[unit]}{unit}"
    return f"{size_bytes}B"


def format_duration(duration_ms: int) -> str:
    for unit in ("d", "h", "min", "s"):
        if duration_ms and duration_ms % DURATION_UNITS_MS[unit] == 0:
            return f"{duration_ms // DURATION_UNITS_MS[unit]}{unit}"
    return f"{duration_ms}ms"


class _Invalid(Exception):
    """A value that its parser refuses; the walk adds file, line and field."""


# A parser turns one node into a value, or raises _Invalid. One with several problems of its own reports them to the
# walk and returns None.
_Parser = Callable[["_Walk", yaml.Node, str], Any]


class _Walk:
    """One pass over one document."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self.lines: dict[str, int] = {}

    def report(self, node: yaml.Node, field_name: str, message: str) -> None:
        self.problems.append(Problem(self.source, node.start_mark.line + 1, field_name, message))

    def mapping(
        self,
        node: yaml.Node,
        field_name: str,
        parsers: Mapping[str, _Parser],
        *,
        required: tuple[str, ...] = (),
        not_built: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Reads a mapping with the given keys. What is wrong is reported, and left out of the result."""
        values: dict[str, Any] = {}
        if _is_null(node):
            pairs = []
        elif isinstance(node, yaml.MappingNode):
            pairs = node.value
        else:
            self.report(node, field_name, f"is {_describe(node)}, must be a mapping of {_listed(parsers)}")
            return values
        seen: set[str] = set()
        for key_node, value_node in pairs:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            path = f"{field_name}.{key}" if field_name else str(key)
            if key is None:
                self.report(key_node, field_name, f"{_describe(key_node)} cannot be a key, allowed: {_listed(parsers)}")
            elif key in seen:
                self.report(key_node, path, "stands twice; keep one of them")
            elif not_built is not None and key in not_built:
                self.report(key_node, path, not_built[key])
            elif key not in parsers:
                import difflib

                close = difflib.get_close_matches(key, parsers, n=1)
                guess = f"; did you mean '{close[0]}'?" if close else ""
                self.report(key_node, path, f"unknown key, allowed: {_listed(parsers)}{guess}")
            else:
                self.lines[path] = value_node.start_mark.line + 1
                try:
                    values[key] = parsers[key](self, value_node, path)
                except _Invalid as invalid:
                    self.report(value_node, path, str(invalid))
            if key is not None:
                seen.add(key)
        for key in required:
            if key not in seen:
                self.report(node, f"{field_name}.{key}" if field_name else key, "is missing, and must be given")
        return values


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _listed(names: Any) -> str:
    return ", ".join(names)


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if _is_null(node):
        return "empty"
    return f"'{_shortened(node.value)}'"


def _shortened(text: str) -> str:
    printable = text if text.isprintable() else repr(text)[1:-1]
    return printable if len(printable) <= 80 else printable[:77] + "..."


def _text(node: yaml.Node, allowed: str) -> str:
    """The text of a scalar as it stands in the file (so that 0660 stays 0660)."""
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise _Invalid(f"is {_describe(node)}, must be {allowed}")
    return node.value


def _parse_version(walk: _Walk, node: yaml.Node, path: str) -> int:
    if _text(node, "1") != "1":
        raise _Invalid(f"is {_describe(node)}, must be 1 (the only version of the configuration so far)")
    return 1


def _parse_boolean(walk: _Walk, node: yaml.Node, path: str) -> bool:
    text = _text(node, "true or false")
    if text not in ("true", "false"):
        raise _Invalid(f"is {_describe(node)}, must be true or false")
    return text == "true"


def _parse_size(walk: _Walk, node: yaml.Node, path: str) -> int:
    allowed = "a number of bytes, or one with a unit: 64MiB, 4GiB (units: B, KiB, MiB, GiB, TiB)"
    match = SIZE.fullmatch(_text(node, allowed))
    if match is None:
        raise _Invalid(f"is {_describe(node)}, must be {allowed}")
    size_bytes = int(match[1]) * SIZE_UNITS[match[2]]
    if size_bytes > SIZE_BYTES_MAX:
        raise _Invalid(f"is {_describe(node)}, must be at most {format_size(SIZE_BYTES_MAX)}")
    return size_bytes


def _parse_segment_size(walk: _Walk, node: yaml.Node, path: str) -> int:
    size_bytes = _parse_size(walk, node, path)
    if size_bytes % MIB or not SEGMENT_BYTES_MIN <= size_bytes <= SEGMENT_BYTES_MAX:
        raise _Invalid(
            f"is {_describe(node)}, must be a multiple of 1MiB "
            f"from {format_size(SEGMENT_BYTES_MIN)} to {format_size(SEGMENT_BYTES_MAX)}"
        )
    return size_bytes


def _parse_duration(walk: _Walk, node: yaml.Node, path: str, least_ms: int = 1, most_ms: int = DURATION_MS_MAX) -> int:
    allowed = "a number with a unit: 5ms, 24h (units: ms, s, min, h, d)"
    if least_ms:
        allowed += ", and more than nothing"
    match = DURATION.fullmatch(_text(node, allowed))
    if match is None or int(match[1]) < least_ms:
        raise _Invalid(f"is {_describe(node)}, must be {allowed}")
    duration_ms = int(match[1]) * DURATION_UNITS_MS[match[2]]
    if duration_ms > most_ms:
        raise _Invalid(f"is {_describe(node)}, must be at most {format_duration(most_ms)}")
    return duration_ms


_parse_age = functools.partial(_parse_duration, least_ms=0, most_ms=AGE_MS_MAX)


def _parse_absolute_path(walk: _Walk, node: yaml.Node, path: str) -> Path:
    text = _text(node, "an absolute path")
    if not text.startswith("/") or "\0" in text or "\n" in text:
        raise _Invalid(f"is {_describe(node)}, must be an absolute path")
    if len(os.fsencode(text)) > PATTERN_BYTES_MAX:
        raise _Invalid(f"is {len(os.fsencode(text))} bytes long, at most {PATTERN_BYTES_MAX} are allowed")
    return Path(os.path.normpath(text))


def _parse_socket(walk: _Walk, node: yaml.Node, path: str) -> Path:
    socket = _parse_absolute_path(walk, node, path)
    length = len(os.fsencode(socket))
    if length > SOCKET_PATH_BYTES_MAX:
        raise _Invalid(f"is {length} bytes long; the kernel allows a socket's path {SOCKET_PATH_BYTES_MAX}")
    return socket


def _parse_permissions(walk: _Walk, node: yaml.Node, path: str) -> int:
    allowed = 'three octal digits, such as "0660" or "0600"'
    match = PERMISSIONS.fullmatch(_text(node, allowed))
    if match is None:
        raise _Invalid(f"is {_describe(node)}, must be {allowed}")
    if node.style is None and match[1] is None:
        # 432 is what a program writes that means 0660; 660 is what a person writes who means it too.
        raise _Invalid(f"is {_describe(node)}, a decimal number for YAML; write {allowed}, with its quotes")
    return int(match[2], 8)


def _parse_group(walk: _Walk, node: yaml.Node, path: str) -> tuple[str, int]:
    name = _text(node, "the name or number of a group")
    if name.isdecimal() and int(name) < 2**31:
        return name, int(name)
    try:
        return name, grp.getgrnam(name).gr_gid
    except KeyError:
        raise _Invalid(f"there is no group '{_shortened(name)}' on this machine (groupadd makes one)") from None


def _one_of(allowed: tuple[str, ...], not_built: Mapping[str, str] | None = None) -> _Parser:
    """A word from a list. `not_built` names words of the design that this version refuses, and why."""

    def parse(walk: _Walk, node: yaml.Node, path: str) -> str:
        text = _text(node, " or ".join(allowed))
        if text in allowed:
            return text
        if not_built is not None and text in not_built:
            raise _Invalid(f"'{text}' {not_built[text]}, allowed: {_listed(allowed)}")
        import difflib

        close = difflib.get_close_matches(text, allowed, n=1)
        guess = f"; did you mean '{close[0]}'?" if close else ""
        raise _Invalid(f"is {_describe(node)}, allowed: {_listed(allowed)}{guess}")

    return parse


NOT_IN_THIS_VERSION = "is not in this version"

_parse_mode = _one_of(
    ("auto", "single_thread", "forced_single", TEST_STUB),
    {"pinned_sharded": f"{NOT_IN_THIS_VERSION} (one worker serves all routes)"},
)
_parse_isolation = _one_of(("per_uid", "per_client"), {})
_parse_flush_word = _one_of(("group", "always", "none"), {"interval": "needs its length: {interval: 5ms}"})


def _parse_shards(walk: _Walk, node: yaml.Node, path: str) -> str | int:
    text = _text(node, "auto or 1")
    if text == "auto":
        return text
    if text == "1":
        return 1
    if text.isdecimal() and text != "0":
        raise _Invalid(f"is {_describe(node)}: more than one worker {NOT_IN_THIS_VERSION}, allowed: auto, 1")
    raise _Invalid(f"is {_describe(node)}, allowed: auto, 1")


def _parse_flush(walk: _Walk, node: yaml.Node, path: str) -> tuple[str, int]:
    """The mode, and for `interval` its milliseconds."""
    if not isinstance(node, yaml.MappingNode):
        return _parse_flush_word(walk, node, path), 0
    values = walk.mapping(node, path, {"interval": _parse_flush_interval}, required=("interval",))
    return "interval", values.get("interval", 0)


def _parse_flush_interval(walk: _Walk, node: yaml.Node, path: str) -> int:
    interval_ms = _parse_duration(walk, node, path)
    if interval_ms > FLUSH_INTERVAL_MS_MAX:
        raise _Invalid(f"is {_describe(node)}, must be from 1ms to {format_duration(FLUSH_INTERVAL_MS_MAX)}")
    return interval_ms


def _parse_route_name(walk: _Walk, node: yaml.Node, path: str) -> str:
    allowed = "1 to 64 characters of a-z, 0-9, _ and - (it names the log's directory)"
    text = _text(node, allowed)
    if ROUTE_NAME.fullmatch(text) is None:
        raise _Invalid(f"is {_describe(node)}, must be {allowed}")
    return text


def check_pattern(pattern: str) -> str | None:
    """What is wrong with a glob, or None."""
    if not pattern.startswith("/"):
        return "must be absolute (start with /)"
    if "\0" in pattern or "\n" in pattern:
        return "must not hold a NUL or a newline"
    length = len(os.fsencode(pattern))
    if length > PATTERN_BYTES_MAX:
        return f"is {length} bytes long, at most {PATTERN_BYTES_MAX} are allowed"
    odd = next((character for character in NOT_WILDCARDS if character in pattern), None)
    if odd is not None:
        return (
            f"'{odd}' is no wildcard here, and cannot be escaped: there are * (within a component), ** (across "
            f"components) and ? (one character, so that it can stand for a '{odd}' in a name); for several patterns "
            f"write several routes"
        )
    if "***" in pattern:
        return "'***' means nothing: * stays within a component, ** crosses components"
    components = pattern[1:].split("/")
    if "" in components:
        return "must not hold an empty component (//, or a / at its end; for all below a directory write /dir/**)"
    if "." in components or ".." in components:
        return "must not hold a '.' or '..' component: paths are matched after they have been resolved"
    return None


def resolve_pattern(pattern: str) -> str:
    """The glob as paths are matched with it: after symlinks are resolved.

    Only what stands before the first wildcard can be resolved; a symlink that a wildcard would match is followed
    by the client, which resolves the whole path before it asks. Raises _Invalid where a resolved name holds a
    character that cannot stand in a glob.
    """
    components = pattern.split("/")
    fixed = next((index for index, c in enumerate(components) if "*" in c or "?" in c), len(components))
    prefix = os.path.realpath("/".join(components[:fixed]) or "/")
    if not set(prefix).isdisjoint("*?" + NOT_WILDCARDS):
        raise _Invalid(
            f"resolves to {prefix}, and a name with one of * ? {' '.join(NOT_WILDCARDS)} cannot be written as a glob; "
            f"write the resolved path, with ? in that character's place"
        )
    return "/".join([prefix.rstrip("/"), *components[fixed:]])


def _parse_pattern(walk: _Walk, node: yaml.Node, path: str) -> tuple[str, str]:
    pattern = _text(node, "an absolute glob, such as /var/log/orders/**")
    wrong = check_pattern(pattern)
    if wrong is not None:
        raise _Invalid(f"'{_shortened(pattern)}': {wrong}")
    return pattern, resolve_pattern(pattern)


_NETWORK = f"network routes are {NOT_IN_THIS_VERSION.removeprefix('is ')}"
_ROUTE_NOT_BUILT = dict.fromkeys(
    ("upstream", "framing", "tls", "app_tls", "allow", "deny"),
    f"{_NETWORK}, allowed: name, match: {{path: ...}}, flush, visibility, on_full",
)


def _parse_match(walk: _Walk, node: yaml.Node, path: str) -> tuple[str, str] | None:
    not_built = dict.fromkeys(("host", "port"), f"{_NETWORK}, allowed: path")
    required = ("path",) if not _mentions(node, "host", "port") else ()
    return walk.mapping(node, path, {"path": _parse_pattern}, required=required, not_built=not_built).get("path")


def _mentions(node: yaml.Node, *keys: str) -> bool:
    return isinstance(node, yaml.MappingNode) and any(
        isinstance(key, yaml.ScalarNode) and key.value in keys for key, _ in node.value
    )


def _network_kind(node: yaml.Node) -> yaml.Node | None:
    """The `kind` of a stream or message route, which this version refuses as a whole."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "kind" and isinstance(value, yaml.ScalarNode):
                return value if value.value in ("stream", "message") else None
    return None


def _parse_route(walk: _Walk, node: yaml.Node, path: str) -> Route | None:
    kind = _network_kind(node)
    if kind is not None:
        walk.report(kind, f"{path}.kind", f"'{kind.value}' {NOT_IN_THIS_VERSION}: {_NETWORK}, allowed: file")
        return None
    values = walk.mapping(
        node,
        path,
        {
            "name": _parse_route_name,
            "match": _parse_match,
            "kind": _one_of(("file",)),
            "flush": _parse_flush,
            "visibility": _one_of(("deferred", "immediate")),
            "on_full": _one_of(("block", "error")),
        },
        required=("name", "match"),
        not_built=_ROUTE_NOT_BUILT,
    )
    values.pop("kind", None)
    match = values.pop("match", None)
    if match is None or "name" not in values:
        return None
    if "flush" in values:
        values["flush"], values["flush_interval_ms"] = values["flush"]
    return Route(pattern_as_written=match[0], pattern=match[1], **values)


def _parse_routes(walk: _Walk, node: yaml.Node, path: str) -> tuple[Route, ...]:
    if _is_null(node):
        return ()
    if not isinstance(node, yaml.SequenceNode):
        raise _Invalid(f"is {_describe(node)}, must be a list of routes: - name: ..., match: {{path: ...}}")
    if len(node.value) > ROUTES_MAX:
        raise _Invalid(f"has {len(node.value)} routes, at most {ROUTES_MAX} are allowed")
    routes: list[Route] = []
    lines: dict[str, int] = {}
    for index, item in enumerate(node.value):
        route = _parse_route(walk, item, f"routes[{index}]")
        if route is None:
            continue
        if route.name in lines:
            taken = f"'{route.name}' is the name of the route at line {lines[route.name]} too; names must differ"
            walk.report(item, f"routes[{index}].name", taken)
        lines.setdefault(route.name, item.start_mark.line + 1)
        routes.append(route)
    return tuple(routes)


def _section(parsers: Mapping[str, _Parser]) -> _Parser:
    return lambda walk, node, path: walk.mapping(node, path, parsers)


_DOCUMENT: Mapping[str, _Parser] = {
    "version": _parse_version,
    "runtime": _section({"mode": _parse_mode, "shards": _parse_shards}),
    "control": _section({"socket": _parse_socket, "mode": _parse_permissions, "group": _parse_group}),
    "ring": _section({"path": _parse_absolute_path, "isolation": _parse_isolation}),
    "wal": _section(
        {
            "dir": _parse_absolute_path,
            "segment_size": _parse_segment_size,
            "max_size": _parse_size,
            "max_age": _parse_age,
            "checkpoint_interval": _parse_duration,
            "allow_volatile": _parse_boolean,
        }
    ),
    "routes": _parse_routes,
    "disk": _section({"engine": _one_of(("threads", "io_uring"), {})}),
    "test": _section({"null_sink": _parse_boolean}),
}


def defaults(source: str = "embedded defaults") -> Config:
    """What holds without a file. Raises ConfigurationError where no safe runtime directory can be had."""
    try:
        socket = places.default_socket()
    except (places.UnsafeDirectory, OSError) as error:
        raise ConfigurationError([Problem(source, 0, "control.socket", str(error))]) from error
    return Config(
        source=source,
        runtime=Runtime(),
        control=Control(socket=socket),
        ring=Ring(path=places.default_ring()),
        wal=Wal(dir=places.default_state_directory() / "wal"),
    )


def load(path: Path | None) -> Config:
    """Reads a file, or takes the embedded defaults. Raises ConfigurationError with every problem that it has."""
    if path is None:
        return defaults()
    source = str(path)
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigurationError([Problem(source, 0, "", f"cannot be read: {error.strerror}")]) from error
    if len(content) > FILE_BYTES_MAX:
        raise ConfigurationError([Problem(source, 0, "", f"is larger than {format_size(FILE_BYTES_MAX)}")])
    return parse(content, source)


def parse(content: bytes | str, source: str) -> Config:
    """As `load`, from memory. `source` is what errors call it."""
    try:
        document = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigurationError([Problem(source, mark.line + 1 if mark else 0, "", f"is not YAML: {what}")]) from error
    except yaml.YAMLError as error:
        raise ConfigurationError([Problem(source, 0, "", f"is not YAML: {' '.join(str(error).split())}")]) from error
    except RecursionError as error:
        raise ConfigurationError([Problem(source, 0, "", "is nested too deeply")]) from error
    if document is None:
        raise ConfigurationError([Problem(source, 1, "version", "is missing, and must be given: version: 1")])

    walk = _Walk(source)
    values = walk.mapping(
        document,
        "",
        _DOCUMENT,
        required=("version",),
        not_built={"admin": f"the admin API {NOT_IN_THIS_VERSION}; leave this section out"},
    )
    base = defaults(source)
    control = values.get("control") or {}
    group, gid = control.pop("group", (None, -1))
    permissions = {"mode": control.pop("mode")} if "mode" in control else {}
    wal = values.get("wal") or {}
    config = Config(
        source=source,
        runtime=Runtime(**(values.get("runtime") or {})),
        control=Control(socket=control.get("socket", base.control.socket), group=group, gid=gid, **permissions),
        ring=Ring(**{"path": base.ring.path, **(values.get("ring") or {})}),
        wal=Wal(
            dir=wal.get("dir", base.wal.dir),
            segment_bytes=wal.get("segment_size", base.wal.segment_bytes),
            max_bytes=wal.get("max_size", base.wal.max_bytes),
            max_age_ms=wal.get("max_age", base.wal.max_age_ms),
            checkpoint_interval_ms=wal.get("checkpoint_interval", base.wal.checkpoint_interval_ms),
            allow_volatile=wal.get("allow_volatile", base.wal.allow_volatile),
        ),
        routes=values.get("routes") or (),
        disk=Disk(**(values.get("disk") or {})),
        test=Test(**(values.get("test") or {})),
        lines=walk.lines,
    )
    if config.is_stub:
        config = _with_places_of_its_own(config)
    problems = walk.problems + _contradictions(config)
    if problems:
        raise ConfigurationError(problems)
    return config


def _with_places_of_its_own(config: Config) -> Config:
    """A stub never takes up the ring or the log that a real daemon has left: what was accepted there is to be durable."""

    def apart(path: Path) -> Path:
        return path if path.name.endswith(STUB_SUFFIX) else path.with_name(path.name + STUB_SUFFIX)

    return config._replace(
        ring=config.ring._replace(path=apart(config.ring.path)),
        # Zero-written ahead, and never filled by a test.
        wal=config.wal._replace(dir=apart(config.wal.dir), segment_bytes=SEGMENT_BYTES_MIN, allow_volatile=True),
    )


def stub_table_of(socket: Path) -> Path:
    """Where the test stub that serves this socket has its table."""
    return socket.with_name(socket.name + STUB_SUFFIX)


def _contradictions(config: Config) -> list[Problem]:
    """Values that are fine alone and wrong together, or wrong on this machine."""
    problems = []
    if config.is_stub and config.test.null_sink:
        problems.append(config.problem("test.null_sink", "is true, and a test stub records what null_sink drops"))
    if config.wal.max_bytes < 2 * config.wal.segment_bytes:
        problems.append(
            config.problem(
                "wal.max_size",
                f"is {format_size(config.wal.max_bytes)}, must hold two segments: at least "
                f"{format_size(2 * config.wal.segment_bytes)}",
            )
        )
    problems += _places_in_each_others_way(config)
    filesystem = places.filesystem_of(config.wal.dir)
    if filesystem.volatile and not config.wal.allow_volatile:
        problems.append(
            config.problem(
                "wal.dir",
                f"{config.wal.dir} is on {filesystem}, whose files do not survive a power cut or the container; "
                f"choose a directory on a disk, or set wal.allow_volatile: true",
            )
        )
    return problems


def _places_in_each_others_way(config: Config) -> list[Problem]:
    """Socket and ring are files of their own, and the log's directory holds nothing but the log."""
    socket, ring, wal = (os.path.realpath(path) for path in (config.control.socket, config.ring.path, config.wal.dir))
    lock = socket + ".lock"
    problems = []
    for name, path, others in (
        ("control.socket", socket, {"ring.path": ring, "wal.dir": wal}),
        ("ring.path", ring, {"control.socket": socket, "the lock beside control.socket": lock, "wal.dir": wal}),
        ("wal.dir", wal, {"control.socket": socket, "the lock beside control.socket": lock, "ring.path": ring}),
    ):
        for other_name, other in others.items():
            if path == other:
                what = f"is {path}, and so is {other_name}"
            elif path.startswith(other + "/"):
                what = f"is {path}, below {other_name} ({other})"
            else:
                continue
            problems.append(config.problem(name, f"{what}; each must have a place of its own"))
            break
    # Two that are the same are one mistake.
    return problems[:1]


def changes_that_need_a_restart(running: Config, wanted: Config) -> list[str]:
    """Names of settings that differ and that a reload cannot change: all but the routes."""
    old, new = running.as_document(), wanted.as_document()
    return [
        f"{section}.{key}"
        for section in ("runtime", "control", "ring", "wal", "disk", "test")
        for key in sorted(old.get(section, {}).keys() | new.get(section, {}).keys())
        if old.get(section, {}).get(key) != new.get(section, {}).get(key)
    ]


def prepare_directories(config: Config) -> None:
    """Creates the directories of socket and log where they are missing. Raises ConfigurationError.

    The socket's directory can be passed through by others where the socket itself may be used by them (its mode
    guards it); the log's directory holds the applications' data and is this user's alone.
    """
    problems = []
    passable = 0o755 if config.control.mode & 0o066 and os.getuid() == 0 else 0o700
    for field_name, directory, mode in (
        ("control.socket", config.control.socket.parent, passable),
        ("wal.dir", config.wal.dir, 0o700),
    ):
        try:
            os.makedirs(directory.parent, exist_ok=True)
            try:
                os.mkdir(directory, mode)
            except FileExistsError:
                if not directory.is_dir():
                    raise NotADirectoryError(None, "it is not a directory", str(directory)) from None
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(None, f"uid {os.geteuid()} may not write there", str(directory))
        except OSError as error:
            reason = error.strerror or str(error)
            problems.append(config.problem(field_name, f"the directory {directory} cannot be used: {reason}"))
    if problems:
        raise ConfigurationError(problems)
