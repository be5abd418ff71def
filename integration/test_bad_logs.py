"""Log directories that hold what they should not, or not what they should: the daemon starts, applies what is good,
names what is not, and goes on writing. What it must refuse it leaves as it was, and says what to do."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from disks import Tmpfs, needs_root
from formats import LOG, crc32c
from programs import Appender

from elgate.daemon.child import ChildDaemon, DaemonFailed

LINES = [f"line {number}" for number in range(20)]
BLOCK = 4096

# No checkpoint comes between: all records are to be replayed.
pytestmark = pytest.mark.elgate(wal={"checkpoint_interval": "10min"})


class Scene:
    """A daemon that was killed with records above its checkpoint, and their file, which a replay must write anew."""

    def __init__(self, daemon: ChildDaemon) -> None:
        self.daemon = daemon
        self.log = daemon.wal_dir / "files"
        daemon.start()
        self.writer = Appender(daemon, daemon.route_dir / "file")
        for line in LINES:
            assert self.writer.append(line) == 0
        daemon.kill()
        # The same inode, and nothing left in it.
        self.file = self.writer.path
        self.file.write_bytes(bytes(self.file.stat().st_size))

    @property
    def segment(self) -> Path:
        """The one with the records."""
        found = [path for path in self.log.glob("*.wal") if any(line.encode() in path.read_bytes() for line in LINES)]
        assert len(found) == 1
        return found[0]

    def restart(self) -> None:
        self.daemon.start()
        self.writer.append_when_possible("and on it goes")
        assert b"and on it goes\n" in self.file.read_bytes()

    def lines(self) -> list[str]:
        return [line for line in LINES if line.encode() + b"\n" in self.file.read_bytes()]

    def notes(self) -> str:
        return "\n".join(f"{event['name']}: {event['text']}" for event in self.daemon.events("log_note"))


@pytest.fixture
def scene(elgate_daemon_stopped: ChildDaemon) -> Iterator[Scene]:
    made = Scene(elgate_daemon_stopped)
    yield made
    made.writer.close()


# ---- what does not belong ------------------------------------------------------------------------------------------


def add_empty(scene: Scene) -> None:
    (scene.log / "x.wal").touch()


def add_short(scene: Scene) -> None:
    (scene.log / "x.wal").write_bytes(b"ELGSEGM")


def add_garbage(scene: Scene) -> None:
    (scene.log / "x.wal").write_bytes(os.urandom(70_001))


def add_giant(scene: Scene) -> None:
    with open(scene.log / "x.wal", "wb") as file:
        file.truncate(1 << 40)


def add_giant_copy(scene: Scene) -> None:
    shutil.copy(scene.segment, scene.log / "x.wal")
    os.truncate(scene.log / "x.wal", 1 << 40)


def add_copy(scene: Scene) -> None:
    shutil.copy(scene.segment, scene.log / "x.wal")


def add_short_copy(scene: Scene) -> None:
    (scene.log / "x.wal").write_bytes(scene.segment.read_bytes()[: 5 * BLOCK])


def add_header_of_a_giant(scene: Scene) -> None:
    """Its checksum is right; what it says is not."""
    layout = LOG["SegmentHeader"]
    block = bytearray(scene.segment.read_bytes()[:BLOCK])
    layout.set(block, 0, "segment_id", 4711)
    layout.set(block, 0, "size_bytes", 4 << 30)
    layout.set(block, 0, "first_lsn", 0)
    layout.set(block, 0, "header_checksum", crc32c(block[4 : layout.size]))
    (scene.log / "x.wal").write_bytes(block + bytes(9 * BLOCK))


def add_segment_of_another_log(scene: Scene) -> None:
    other = scene.daemon.directory / "other"
    with ChildDaemon(other, sections={"wal": {"segment_size": "8MiB"}}) as daemon:
        daemon.start()
        writer = Appender(daemon, daemon.route_dir / "file")
        assert writer.append("of another log") == 0
        writer.close()
        daemon.kill()
        (segment,) = [path for path in (daemon.wal_dir / "files").glob("*.wal") if b"of another" in path.read_bytes()]
        shutil.copy(segment, scene.log / "x.wal")


def add_directory(scene: Scene) -> None:
    (scene.log / "x.wal").mkdir()


def add_pipe(scene: Scene) -> None:
    os.mkfifo(scene.log / "x.wal")


def add_socket(scene: Scene) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(scene.log)  # a socket's path is short
        try:
            listener.bind("x.wal")
        finally:
            os.chdir(here)


def add_link(scene: Scene) -> None:
    (scene.log / "x.wal").symlink_to(scene.segment)


def add_strange_name(scene: Scene) -> None:
    (scene.log / ("é\n" * 60 + ".wal")).write_bytes(b"x")


@pytest.mark.parametrize(
    "add",
    [
        add_empty, add_short, add_garbage, add_giant, add_giant_copy, add_copy, add_short_copy, add_header_of_a_giant,
        add_segment_of_another_log, add_directory, add_pipe, add_socket, add_link, add_strange_name,
    ],
)  # fmt: skip
def test_what_does_not_belong_is_put_aside_and_stops_nothing(scene: Scene, add: Callable[[Scene], None]) -> None:
    before = {path.name for path in scene.log.iterdir()}
    add(scene)
    (added,) = {path.name for path in scene.log.iterdir()} - before
    is_file = (scene.log / added).is_file() and not (scene.log / added).is_symlink()
    scene.restart()
    assert scene.lines() == LINES
    assert scene.daemon.wait_for_event("log_replayed")["missing"] == 0
    if add is not add_header_of_a_giant:  # a prepared segment, it says: it is made one, or removed
        assert scene.notes(), "somebody is told"
        assert (scene.log / added).exists() != is_file, "a file is put aside, all else is left where it is"
    assert scene.daemon.stop() == 0


def remove_checkpoint(scene: Scene) -> None:
    (scene.log / "checkpoint").unlink()


def empty_checkpoint(scene: Scene) -> None:
    os.truncate(scene.log / "checkpoint", 0)


def garble_checkpoint(scene: Scene) -> None:
    (scene.log / "checkpoint").write_bytes(os.urandom(2 * BLOCK))


def giant_checkpoint(scene: Scene) -> None:
    os.truncate(scene.log / "checkpoint", 1 << 40)


def checkpoint_of_the_future(scene: Scene) -> None:
    """Whole, and it says what cannot be."""
    layout = LOG["Checkpoint"]
    raw = bytearray((scene.log / "checkpoint").read_bytes())
    for base in (0, BLOCK):
        if layout.get(raw, base, "magic"):
            layout.set(raw, base, "applied_lsn", (1 << 64) - 1)
            layout.set(raw, base, "header_checksum", crc32c(raw[base + 4 : base + layout.size]))
    (scene.log / "checkpoint").write_bytes(raw)


def checkpoint_that_is_a_directory(scene: Scene) -> None:
    (scene.log / "checkpoint").unlink()
    (scene.log / "checkpoint").mkdir()


def checkpoint_that_is_a_link(scene: Scene) -> None:
    (scene.log / "checkpoint").rename(scene.log / "elsewhere")
    (scene.log / "checkpoint").symlink_to("elsewhere")


def quarantine_that_is_a_file(scene: Scene) -> None:
    (scene.log / "quarantine").write_text("somebody's")
    add_garbage(scene)


def no_lock(scene: Scene) -> None:
    (scene.daemon.wal_dir / "lock").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        remove_checkpoint, empty_checkpoint, garble_checkpoint, giant_checkpoint, checkpoint_of_the_future,
        checkpoint_that_is_a_directory, checkpoint_that_is_a_link, quarantine_that_is_a_file, no_lock,
    ],
)  # fmt: skip
def test_without_its_other_files_a_log_still_gives_what_it_holds(scene: Scene, spoil: Callable[[Scene], None]) -> None:
    spoil(scene)
    scene.restart()
    assert scene.lines() == LINES
    assert scene.daemon.wait_for_event("log_replayed")["missing"] == 0
    assert scene.daemon.stop() == 0


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_damage_is_named_to_the_record_and_kept(scene: Scene) -> None:
    raw = scene.segment.read_bytes()
    at = raw.index(b"line 7\n")
    with open(scene.segment, "r+b") as file:
        file.seek(at)
        file.write(b"LINE")
    scene.restart()
    assert scene.lines() == [line for line in LINES if line != "line 7"]
    replayed = scene.daemon.wait_for_event("log_replayed")
    assert replayed["missing"] == 1
    assert (scene.log / "receipts" / replayed["receipt"]).exists()
    assert any(b"LINE 7" in path.read_bytes() for path in (scene.log / "quarantine").iterdir())
    assert scene.daemon.stop() == 0


@pytest.mark.parametrize("length", [0, 100, BLOCK, 6 * BLOCK + 100])
def test_a_segment_that_was_cut_short_gives_what_is_left(scene: Scene, length: int) -> None:
    os.truncate(scene.segment, length)
    scene.restart()
    # What nothing else on the disk knows of is not missed; what is there is in order, without a hole.
    found = scene.lines()
    if len(found) < len(LINES) and found[-1:] == LINES[-1:]:
        found.pop()  # its slot had not been given back when the daemon was killed: the ring has it still
    assert found == LINES[: len(found)]
    assert len(found) > 0 or length <= BLOCK
    if length > 0:  # an empty one is what a preparation that was cut short leaves
        scene.daemon.wait_for_event("log_note")
    assert scene.daemon.stop() == 0


def test_a_segment_that_was_made_longer_is_as_good_as_before(scene: Scene) -> None:
    os.truncate(scene.segment, 1 << 40)
    scene.restart()
    assert scene.lines() == LINES
    assert scene.daemon.stop() == 0


@pytest.mark.parametrize("content", ["zeros", "garbage"])
def test_a_segment_of_which_nothing_is_left_stops_nothing(scene: Scene, content: str) -> None:
    segment = scene.segment
    size = segment.stat().st_size
    segment.write_bytes(bytes(size) if content == "zeros" else os.urandom(size))
    scene.restart()
    assert scene.lines() == []
    assert scene.daemon.stop() == 0


# ---- what must be refused -------------------------------------------------------------------------------------------


def refusal(daemon: ChildDaemon, code: int = 1) -> str:
    with pytest.raises(DaemonFailed):
        daemon.start()
    assert daemon.process is not None
    assert daemon.process.wait(30) == code
    events = daemon.events("start_failed" if code == 1 else "already_running")
    assert events, daemon.log_text()
    return events[-1]["reason"]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["segment", "checkpoint"])
def test_a_log_of_another_version_is_refused_and_left_as_it_is(scene: Scene, name: str) -> None:
    path = scene.segment if name == "segment" else scene.log / "checkpoint"
    layout = LOG["SegmentHeader" if name == "segment" else "Checkpoint"]
    original = path.read_bytes()
    raw = bytearray(original)
    for base in (0,) if name == "segment" else (0, BLOCK):
        if layout.get(raw, base, "magic"):
            layout.set(raw, base, "version", 99)
            layout.set(raw, base, "header_checksum", crc32c(raw[base + 4 : base + layout.size]))
    path.write_bytes(raw)
    before = contents(scene.daemon.wal_dir)
    reason = refusal(scene.daemon)
    assert str(path) in reason
    assert "version 99" in reason
    assert "wal.dir" in reason, "it says what to do"
    assert contents(scene.daemon.wal_dir) == before
    # The one that wrote it goes on with it.
    path.write_bytes(original)
    scene.restart()
    assert scene.lines() == LINES
    assert scene.daemon.stop() == 0


def test_a_second_daemon_on_the_same_log_is_refused_and_disturbs_nothing(elgate_daemon: ChildDaemon) -> None:
    writer = Appender(elgate_daemon, elgate_daemon.route_dir / "file")
    assert writer.append("one") == 0
    with ChildDaemon(elgate_daemon.directory / "second") as second:
        document = yaml.safe_load(second.config_path.read_text())
        document["wal"]["dir"] = str(elgate_daemon.wal_dir)
        second.config_path.write_text(yaml.safe_dump(document))
        reason = refusal(second, code=3)
        assert str(elgate_daemon.wal_dir) in reason
        assert "another daemon" in reason
        assert not second.socket.exists()
    assert writer.append("two") == 0
    writer.close()
    assert (elgate_daemon.route_dir / "file").read_bytes() == b"one\ntwo\n"
    assert elgate_daemon.stop() == 0


@needs_root
def test_no_room_for_the_ring_is_a_clear_refusal_that_ends_with_the_want(elgate_daemon_stopped: ChildDaemon) -> None:
    daemon = elgate_daemon_stopped
    with Tmpfs(daemon.directory / "shm", 1 << 20) as memory:
        ring_path = memory.mount_point / "ring"
        document = yaml.safe_load(daemon.config_path.read_text())
        document["ring"]["path"] = str(ring_path)
        daemon.config_path.write_text(yaml.safe_dump(document))
        reason = refusal(daemon)
        assert str(ring_path) in reason
        assert "NOSPC" in reason or "space" in reason
        memory.resize(16 << 20)
        daemon.start()
        writer = Appender(daemon, daemon.route_dir / "file")
        assert writer.append("one") == 0
        # Full now, with the ring in it: what it needs it has.
        memory.resize(5 << 20)
        memory.fill()
        assert writer.append("two") == 0
        writer.close()
        assert daemon.stop() == 0
        daemon.start()
        assert daemon.stop() == 0
