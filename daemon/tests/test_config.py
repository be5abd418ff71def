"""The configuration: each mistake is found, named with its line, and told what is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from elgate.daemon import config, places
from elgate.daemon.config import ConfigurationError


def problems_of(text: str | bytes) -> list[str]:
    with pytest.raises(ConfigurationError) as raised:
        config.parse(text, "test.yaml")
    return [str(problem) for problem in raised.value.problems]


def only_problem_of(text: str | bytes) -> str:
    problems = problems_of(text)
    assert len(problems) == 1, problems
    return problems[0]


def document(text: str) -> str:
    return f"version: 1\n{text}"


@pytest.fixture(autouse=True)
def state_on_a_disk(disk_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default log directory must not be what a test of something else stumbles over."""
    monkeypatch.setattr(places, "default_state_directory", lambda: disk_dir)
    monkeypatch.setattr(places, "VOLATILE_FILESYSTEMS", frozenset({"tmpfs"}))


# What stands in the file, the line that must be named, and words that must be in the message.
MISTAKES = [
    # the document
    ("version: 2", 1, ["version", "'2'", "must be 1"]),
    ("routes: []", 1, ["version", "missing"]),
    ("", 1, ["version", "missing"]),
    ("- 1", 1, ["is a list", "mapping", "wal"]),
    ("just text", 1, ["'just text'", "mapping"]),
    (document("wal: {dir: /a"), 2, ["not YAML"]),
    (document("wal:\n\tdir: /a"), 3, ["not YAML"]),
    ("version: 1\n---\nversion: 1", 2, ["not YAML", "document"]),
    (document("routs: []"), 2, ["routs", "unknown key", "did you mean 'routes'"]),
    (document("version: 1"), 2, ["version", "twice"]),
    (document("[1, 2]: x"), 2, ["cannot be a key"]),
    (document("admin: {listen: unix:/x}"), 2, ["admin", "not in this version"]),
    # runtime
    (document("runtime: {mode: pinned_sharded}"), 2, ["runtime.mode", "not in this version", "single_thread"]),
    (document("runtime: {mode: test_stub}\ntest: {null_sink: true}"), 3, ["test.null_sink", "test stub"]),
    (document("runtime: {mode: singel_thread}"), 2, ["runtime.mode", "did you mean 'single_thread'"]),
    (document("runtime: {shards: 4}"), 2, ["runtime.shards", "more than one worker", "allowed: auto, 1"]),
    (document("runtime: {shards: 0}"), 2, ["runtime.shards", "'0'", "allowed: auto, 1"]),
    (document("runtime: 5"), 2, ["runtime", "'5'", "mapping of mode, shards"]),
    # control
    (document("control: {socket: a.sock}"), 2, ["control.socket", "absolute"]),
    (document(f"control: {{socket: /{'x' * 107}}}"), 2, ["control.socket", "108 bytes", "107"]),
    (document("control: {mode: 0999}"), 2, ["control.mode", "octal"]),
    (document("control: {mode: rw-rw----}"), 2, ["control.mode", "octal"]),
    (document("control: {mode: 432}"), 2, ["control.mode", "'432'", "decimal", '"0660"']),
    (document("control: {mode: 660}"), 2, ["control.mode", "'660'", "decimal", '"0660"']),
    (document("control: {mode: 0x1b0}"), 2, ["control.mode", "octal"]),
    (document("control: {socket: /dev/shm/same}\nring: {path: /dev/shm/same}"), 2, ["control.socket", "ring.path"]),
    (document("control: {socket: /a/s}\nring: {path: /a/s.lock}"), 3, ["ring.path", "lock", "control.socket"]),
    (document("control: {socket: /a/s}\nring: {path: /a/s/r}"), 3, ["ring.path", "below control.socket"]),
    (document("control: {socket: /a/wal/s}\nwal: {dir: /a/wal}"), 2, ["control.socket", "below wal.dir (/a/wal)"]),
    (document("control: {socket: /a/wal}\nwal: {dir: /a/wal}"), 2, ["control.socket", "wal.dir"]),
    (document("ring: {path: /a/wal/r}\nwal: {dir: /a/wal}"), 2, ["ring.path", "below wal.dir"]),
    (document("ring: {path: /a/r}\nwal: {dir: /a/r/wal}"), 3, ["wal.dir", "below ring.path"]),
    (document("control: {group: no-such-group-here}"), 2, ["control.group", "no group 'no-such-group-here'"]),
    # ring
    (document("ring: {path: ring}"), 2, ["ring.path", "absolute"]),
    (document("ring: {isolation: per_host}"), 2, ["ring.isolation", "per_client", "per_uid"]),
    # wal
    (document("wal: {dir: /dev/shm/wal}"), 2, ["wal.dir", "tmpfs", "allow_volatile"]),
    (document("wal:\n  segment_size: 64MB"), 3, ["wal.segment_size", "'64MB'", "MiB"]),
    (document("wal: {segment_size: 1MiB}"), 2, ["wal.segment_size", "8MiB"]),
    (document("wal: {segment_size: 16777217}"), 2, ["wal.segment_size", "multiple of 1MiB"]),
    (document("wal: {segment_size: -1}"), 2, ["wal.segment_size", "'-1'"]),
    (document("wal: {segment_size: [64MiB]}"), 2, ["wal.segment_size", "a list"]),
    (document("wal: {max_size: 64MiB}"), 2, ["wal.max_size", "two segments", "128MiB"]),
    (document("wal: {max_age: 24}"), 2, ["wal.max_age", "'24'", "24h"]),
    (document("wal: {checkpoint_interval: 0s}"), 2, ["wal.checkpoint_interval", "more than nothing"]),
    (document("wal: {checkpoint_interval: 999999999999d}"), 2, ["wal.checkpoint_interval", "at most 49d"]),
    (document("wal: {checkpoint_interval: 50d}"), 2, ["wal.checkpoint_interval", "at most 49d"]),
    (document("wal: {max_age: 999999999999d}"), 2, ["wal.max_age", "at most 3650d"]),
    (document("wal: {max_size: 999999999999999999TiB}"), 2, ["wal.max_size", "at most 1024TiB"]),
    (document("wal: {max_size: 1025TiB}"), 2, ["wal.max_size", "at most 1024TiB"]),
    (document("wal: {allow_volatile: yes}"), 2, ["wal.allow_volatile", "'yes'", "true or false"]),
    (document("wal: {max_age:}"), 2, ["wal.max_age", "is empty"]),
    # routes
    (document("routes: {name: a}"), 2, ["routes", "list"]),
    (document("routes:\n  - text"), 3, ["routes[0]", "'text'", "mapping"]),
    (document("routes:\n  - match: {path: /a/**}"), 3, ["routes[0].name", "missing"]),
    (document("routes:\n  - name: a"), 3, ["routes[0].match", "missing"]),
    (document("routes:\n  - {name: a, match: {}}"), 3, ["routes[0].match.path", "missing"]),
    (document("routes:\n  - {name: Orders, match: {path: /a}}"), 3, ["routes[0].name", "'Orders'", "a-z"]),
    (document(f"routes:\n  - {{name: {'x' * 65}, match: {{path: /a}}}}"), 3, ["routes[0].name", "64"]),
    (document("routes:\n  - {name: ../x, match: {path: /a}}"), 3, ["routes[0].name"]),
    (
        document("routes:\n  - {name: a, match: {path: /a/**}}\n  - {name: a, match: {path: /b/**}}"),
        4,
        ["routes[1].name", "line 3"],
    ),
    (document("routes:\n  - {name: a, match: {path: /a}, flush: sometimes}"), 3, ["flush", "group, always"]),
    (document("routes:\n  - {name: a, match: {path: /a}, flush: interval}"), 3, ["flush", "{interval: 5ms}"]),
    (document("routes:\n  - {name: a, match: {path: /a}, flush: {}}"), 3, ["flush.interval", "missing"]),
    (document("routes:\n  - {name: a, match: {path: /a}, flush: {interval: 5}}"), 3, ["flush.interval", "5ms"]),
    (document("routes:\n  - {name: a, match: {path: /a}, flush: {interval: 0ms}}"), 3, ["flush.interval", "nothing"]),
    (
        document("routes:\n  - {name: a, match: {path: /a}, flush: {interval: 61s}}"),
        3,
        ["flush.interval", "from 1ms to 1min"],
    ),
    (document("routes:\n  - {name: a, match: {path: /a}, visibility: now}"), 3, ["visibility", "deferred, immediate"]),
    (document("routes:\n  - {name: a, match: {path: /a}, on_full: drop}"), 3, ["on_full", "block, error"]),
    (document("routes:\n  - {name: a, kind: stream, upstream: x}"), 3, ["routes[0].kind", "not in this version"]),
    (document("routes:\n  - {name: a, kind: message, upstream: x}"), 3, ["routes[0].kind", "not in this version"]),
    (document("routes:\n  - {name: a, match: {host: b}}"), 3, ["routes[0].match.host", "not in this version"]),
    (document("routes:\n  - {name: a, match: {path: /a}, tls: {}}"), 3, ["routes[0].tls", "not in this version"]),
]

BAD_PATTERNS = [
    ("relative/**", "absolute"),
    ("**", "absolute"),
    ("/a//b", "empty component"),
    ("/a/", "empty component"),
    ("/", "empty component"),
    ("/a/./b", "'.' or '..'"),
    ("/a/../b", "'.' or '..'"),
    ("/a/..", "'.' or '..'"),
    ("/a/***", "'***'"),
    ("/a/[abc", "'['"),
    ("/a/b]", "']'"),
    ("/a/{b,c}/**", "'{'"),
    ("/a/b}", "'}'"),
    ("/a/\\*", "'\\' is no wildcard here, and cannot be escaped: there are * "),
    ("/a\nb", "newline"),
    ("/a\0b", "NUL"),
    ("/" + "x" * 4096, "4097 bytes"),
]


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES)
def test_a_mistake_is_named_with_its_line_and_what_is_allowed(text: str, line: int, words: list[str]) -> None:
    problem = only_problem_of(text)
    assert problem.startswith(f"test.yaml:{line}: "), problem
    for word in words:
        assert word in problem


@pytest.mark.parametrize(("pattern", "word"), BAD_PATTERNS, ids=range(len(BAD_PATTERNS)))
def test_a_bad_glob_is_refused(pattern: str, word: str) -> None:
    text = yaml.safe_dump({"version": 1, "routes": [{"name": "a", "match": {"path": pattern}}]})
    problem = only_problem_of(text)
    assert "routes[0].match.path" in problem
    assert word in problem


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_lines() -> None:
    text = document(
        "wal:\n  segment_size: 1\n  max_age: soon\nroutes:\n  - name: A\n    match: {path: x}\n    flash: group\n"
    )
    problems = problems_of(text)
    assert [problem.split(":")[1] for problem in problems] == ["3", "4", "6", "7", "8"]


@pytest.mark.parametrize(
    "content",
    [
        b"version: 1\nroutes: \xff\xfe",
        b"version: 1\nroutes: \x00",
        b"[" * 100_000,
        b"version: 1\nroutes: &a [*a]",
        b"version: 1\nroutes: !!python/object/apply:os.system [x]",
        b"version: &a 1\nruntime: *b",
        b"{" * 3,
    ],
)
def test_hostile_content_is_a_configuration_error(content: bytes) -> None:
    problems_of(content)


def test_a_file_that_cannot_be_read_or_is_huge_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.yaml: cannot be read: No such file"):
        config.load(tmp_path / "missing.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (config.FILE_BYTES_MAX + 1))
    with pytest.raises(ConfigurationError, match="larger than 1MiB"):
        config.load(tmp_path / "huge.yaml")


def test_a_full_file_is_read(disk_dir: Path) -> None:
    loaded = config.parse(
        f"""
version: 1
runtime: {{mode: single_thread, shards: 1}}
control: {{socket: {disk_dir}/c.sock, mode: "0600", group: "0"}}
ring: {{path: /dev/shm/elgate_ring-test, isolation: per_uid}}
wal: {{dir: {disk_dir}/wal, segment_size: 16MiB, max_size: 1GiB, max_age: 90min,
       checkpoint_interval: 250ms, allow_volatile: false}}
routes:
  - name: orders
    match: {{path: "{disk_dir}/orders/**"}}
    flush: always
    visibility: immediate
    on_full: error
  - name: rest
    kind: file
    match: {{path: "{disk_dir}/*.log"}}
""",
        "test.yaml",
    )
    assert loaded.control == config.Control(disk_dir / "c.sock", 0o600, "0", 0)
    assert loaded.wal == config.Wal(disk_dir / "wal", 16 << 20, 1 << 30, 90 * 60_000, 250, False)
    assert [route.name for route in loaded.routes] == ["orders", "rest"]
    assert (loaded.routes[0].flush, loaded.routes[0].visibility, loaded.routes[0].on_full) == (
        "always",
        "immediate",
        "error",
    )
    assert (loaded.routes[1].flush, loaded.routes[1].visibility, loaded.routes[1].on_full) == (
        "group",
        "deferred",
        "block",
    )


def test_what_show_prints_reads_back_as_the_same_configuration(disk_dir: Path) -> None:
    text = document(
        f"wal: {{segment_size: 8388608, max_size: 20000001, max_age: 1500ms}}\n"
        f"control: {{mode: 0640}}\n"
        f"routes:\n  - {{name: a, match: {{path: {disk_dir}/**}}}}\n"
    )
    loaded = config.parse(text, "test.yaml")
    again = config.parse(yaml.safe_dump(loaded.as_document()), "test.yaml")
    assert again.as_document() == loaded.as_document()
    assert again.control.mode == 0o640
    assert again.wal.max_bytes == 20000001


@pytest.mark.parametrize("written", ['"0640"', "'640'", '"0o640"', "0640", "0o640"])
def test_permissions_are_octal_however_they_are_written(written: str) -> None:
    assert config.parse(document(f"control: {{mode: {written}}}"), "test.yaml").control.mode == 0o640


def test_the_engine_holds_the_largest_values(disk_dir: Path) -> None:
    from elgate.daemon import engine

    loaded = config.parse(
        document(
            f"wal: {{checkpoint_interval: 49d, max_age: 3650d, max_size: 1024TiB}}\n"
            f"routes:\n  - {{name: a, match: {{path: {disk_dir}/**}}}}\n"
        ),
        "test.yaml",
    )
    target = engine._ffi.new("struct elgate_engine_config *")
    target.checkpoint_interval_ms = loaded.wal.checkpoint_interval_ms
    target.log_age_max_ms = loaded.wal.max_age_ms
    routes = engine._Arguments().routes(loaded)
    assert target.checkpoint_interval_ms == 49 * 86_400_000
    assert target.log_age_max_ms == 3650 * 86_400_000
    assert routes[0].log_bytes_max == 1 << 50


def test_segments_below_the_checkpoint_are_kept_by_request_only() -> None:
    assert config.defaults().wal.max_age_ms == 0
    assert config.parse(document("wal: {max_age: 0s}"), "test.yaml").as_document()["wal"]["max_age"] == "0ms"
    assert config.parse(document("wal: {max_age: 0ms}"), "test.yaml").wal.max_age_ms == 0


def test_settings_for_tests_are_read_and_shown_only_when_on() -> None:
    assert "test" not in config.defaults().as_document()
    loaded = config.parse(document("test: {null_sink: true}"), "test.yaml")
    assert loaded.test == config.Test(null_sink=True)
    assert loaded.as_document()["test"] == {"null_sink": True}
    assert config.changes_that_need_a_restart(config.defaults("test.yaml"), loaded) == ["test.null_sink"]


def test_empty_sections_mean_defaults() -> None:
    loaded = config.parse("version: 1\nwal:\ncontrol:\nroutes:\ntest:\n", "test.yaml")
    assert loaded.as_document() == config.defaults().as_document()


def test_a_pattern_is_resolved_through_the_symlinks_before_its_first_wildcard(disk_dir: Path) -> None:
    real = Path(os.path.realpath(disk_dir))
    (real / "real").mkdir()
    (real / "link").symlink_to(real / "real")
    assert config.resolve_pattern(f"{real}/link/**") == f"{real}/real/**"
    assert config.resolve_pattern(f"{real}/link/a.log") == f"{real}/real/a.log"
    assert config.resolve_pattern(f"{real}/link/x*/link/**") == f"{real}/real/x*/link/**"
    assert config.resolve_pattern(f"{real}/not-there/*.log") == f"{real}/not-there/*.log"
    assert config.resolve_pattern("/**") == "/**"
    assert config.resolve_pattern("/*.log") == "/*.log"


@pytest.mark.parametrize("name", ["odd*name", "odd[name"])
def test_a_pattern_that_resolves_to_a_name_with_a_wildcard_in_it_is_refused(disk_dir: Path, name: str) -> None:
    (disk_dir / name).mkdir()
    (disk_dir / "link").symlink_to(disk_dir / name)
    text = document(f"routes:\n  - {{name: a, match: {{path: {disk_dir}/link/**}}}}")
    assert "cannot be written as a glob" in only_problem_of(text)


def test_only_routes_can_change_by_a_reload(disk_dir: Path) -> None:
    running = config.parse(document("wal: {max_age: 1h}"), "test.yaml")
    more_routes = config.parse(
        document(f"wal: {{max_age: 1h}}\nroutes:\n  - {{name: a, match: {{path: {disk_dir}/**}}}}"), "test.yaml"
    )
    other_log = config.parse(document("wal: {max_age: 2h, max_size: 1GiB}\nring: {path: /dev/shm/r}"), "test.yaml")
    assert config.changes_that_need_a_restart(running, more_routes) == []
    assert config.changes_that_need_a_restart(running, other_log) == ["ring.path", "wal.max_age", "wal.max_size"]


def test_directories_that_cannot_be_made_are_named_with_their_line(disk_dir: Path) -> None:
    (disk_dir / "file").write_text("")
    text = document(f"wal:\n  dir: {disk_dir}/file/wal\ncontrol:\n  socket: {disk_dir}/c.sock\n")
    loaded = config.parse(text, "test.yaml")
    with pytest.raises(ConfigurationError) as raised:
        config.prepare_directories(loaded)
    assert str(raised.value).startswith(f"test.yaml:3: wal.dir: the directory {disk_dir}/file/wal cannot be used: ")
    loaded = config.parse(document(f"control: {{socket: {disk_dir}/run/a/c.sock}}\nwal: {{dir: {disk_dir}/a/b}}"), "t")
    config.prepare_directories(loaded)
    config.prepare_directories(loaded)
    assert (disk_dir / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (disk_dir / "run" / "a").is_dir()


class TestPlaces:
    def test_a_users_runtime_directory_under_tmp_is_private_or_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        uid = 2_000_000_000 + os.getpid()
        monkeypatch.setattr(os, "getuid", lambda: uid)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        directory = Path(f"/tmp/elgate-{uid}")
        try:
            # Made by uid 0 (or whoever runs the tests), not by the user that we claim to be: refused.
            with pytest.raises(places.UnsafeDirectory, match="mode 0700"):
                places.user_runtime_directory()
            assert directory.stat().st_mode & 0o777 == 0o700
            with pytest.raises(ConfigurationError, match=r"control\.socket: /tmp/elgate-"):
                config.defaults()
        finally:
            directory.rmdir()

    def test_a_user_gets_the_directories_of_the_session(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(os, "getuid", lambda: 4711)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
        assert places.default_socket() == tmp_path / "elgate" / "control.sock"
        assert places.default_ring() == Path("/dev/shm/elgate_ring-u4711")
        assert places.default_state_directory() == Path("/somewhere/elgate")
        monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
        assert places.default_state_directory() == Path.home() / ".local/state/elgate"

    def test_root_gets_the_hosts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(os, "getuid", lambda: 0)
        assert places.default_socket() == Path("/run/elgate/control.sock")
        assert places.default_ring() == Path("/dev/shm/elgate_ring")
        assert places.default_state_directory() == Path("/var/lib/elgate")

    def test_mounts_are_read_as_the_kernel_writes_them(self, tmp_path: Path) -> None:
        table = tmp_path / "mounts"
        table.write_text("/dev/vda1 / ext4 rw 0 0\n" + r"none /a\040b\134c\011\012/\303ü tmpfs rw,size=1k 0 0" + "\n")
        assert list(places.mounts(table)) == [
            ["/dev/vda1", "/", "ext4"],
            ["none", "/a b\\c\t\n/Ãü", "tmpfs"],
        ]

    def test_shared_memory_is_volatile(self) -> None:
        assert places.filesystem_of(Path("/dev/shm/not/there/yet")).type == "tmpfs"
        assert places.filesystem_of(Path("/dev/shm")).volatile


def test_a_test_stub_has_places_of_its_own(disk_dir: Path) -> None:
    text = document(
        f"runtime: {{mode: test_stub}}\ncontrol: {{socket: {disk_dir}/s}}\nring: {{path: {disk_dir}/ring}}\n"
        f"wal: {{dir: {disk_dir}/wal, segment_size: 64MiB}}"
    )
    loaded = config.parse(text, "test.yaml")
    assert (loaded.ring.path, loaded.wal.dir) == (disk_dir / "ring.stub", disk_dir / "wal.stub")
    assert loaded.wal.allow_volatile and loaded.wal.segment_bytes == config.SEGMENT_BYTES_MIN
    assert config.stub_table_of(loaded.control.socket) == disk_dir / "s.stub"
    again = config.parse(yaml.safe_dump(loaded.as_document()), "test.yaml")
    assert again.as_document() == loaded.as_document()
