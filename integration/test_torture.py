"""Programs that do with their files whatever programs do, while the daemon is killed again and again."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest
from disks import Ext4, needs_root
from programs import LIMIT_S

from elgate.daemon.child import ChildDaemon

PROGRAM = Path(__file__).with_name("torture_program.py")
PROGRAMS = 3
OPERATIONS = 400
KILLS = 6

MODES = [
    pytest.param(
        mode,
        marks=pytest.mark.elgate(
            routes=[{"name": "files", "match": {"path": "{route_dir}/**"}, "flush": mode}],
            wal={"checkpoint_interval": interval},
        ),
        id=mode if isinstance(mode, str) else "interval",
    )
    for mode, interval in (("group", "200ms"), ("none", "1s"), ({"interval": "20ms"}, "5s"))
]


def start(daemon: ChildDaemon, number: int, seed: int, *journal: Path) -> subprocess.Popen[str]:
    directory = daemon.route_dir / f"program-{number}"
    return subprocess.Popen(
        [sys.executable, PROGRAM, directory, str(seed + number), str(OPERATIONS), *journal],
        env=daemon.env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_file_is_what_its_program_has_made_it(mode: object, elgate_daemon: ChildDaemon) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    programs = [start(elgate_daemon, number, seed) for number in range(PROGRAMS)]
    elgate_daemon.wait_for_event("session_opened", count=PROGRAMS)
    # Each kill when one of them has come so far.
    leader = programs[0]
    kills = sorted(dice.sample(range(1, OPERATIONS // 20), KILLS))
    assert leader.stdout is not None
    heard: list[str] = []
    for line in leader.stdout:
        heard.append(line)
        if line == "done\n":
            break  # it waits for its input now
        if kills and line.strip().isdigit() and int(line) >= kills[0] * 20:
            kills.pop(0)
            elgate_daemon.kill()
            elgate_daemon.start()
    assert not kills, "it ended before all kills:\n" + "".join(heard)
    for program in programs:
        said, _ = program.communicate("end\n", timeout=2 * LIMIT_S)
        assert program.returncode == 0, said
    assert not elgate_daemon.events("records_quarantined"), elgate_daemon.log_text()


def synced_by(journal: Path) -> dict[str, tuple[int, str]]:
    """What is durable for certain: the files that were synced, and not changed since."""
    synced = {}
    for line in journal.read_text().splitlines() if journal.exists() else ():  # it had not begun yet
        kind, path, *rest = line.split()
        if kind == "synced":
            synced[path] = (int(rest[0]), rest[1])
        else:
            synced.pop(path, None)
    return synced


@needs_root
@pytest.mark.parametrize("flush", ["group", "none"])
def test_what_was_synced_survives_a_power_cut(flush: str, disk_dir: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    cut_at = random.Random(seed).randrange(100, OPERATIONS - 40) // 20 * 20
    journals = [disk_dir / f"journal-{number}" for number in range(PROGRAMS)]
    with (
        Ext4(disk_dir / "mnt", disk_dir / "disk.img", 512 << 20) as image,
        ChildDaemon(image.mount_point / "elgate", sections={"wal": {"segment_size": "8MiB"}}) as daemon,
    ):
        daemon.write_config([{"name": "files", "match": {"path": f"{daemon.route_dir}/**"}, "flush": flush}])
        daemon.log_path = disk_dir / "daemon.log"
        daemon.start()
        programs = [start(daemon, number, seed, journal) for number, journal in enumerate(journals)]
        try:
            leader = programs[0].stdout
            assert leader is not None
            for line in leader:
                if line.strip() == str(cut_at):
                    break
            image.cut_power()
        finally:
            for program in programs:
                program.kill()
                program.communicate()
        daemon.kill()
        image.unmount()
        image.mount()
        daemon.ring_path.unlink()
        daemon.start()
        assert daemon.stop() == 0, daemon.log_text()[-4000:]
        checked = 0
        for journal in journals:
            for path, (length, digest) in synced_by(journal).items():
                # A name that was changed, and whose directory was not synced, may be the old one.
                root = Path(path).parents[1 if Path(path).parent.name == "sub" else 0]
                content = [file.read_bytes() for file in (Path(path), *root.rglob("*")) if file.is_file()]
                digests = [hashlib.sha1(found).hexdigest() for found in content if len(found) == length]
                assert digest in digests, (path, length, [len(found) for found in content], daemon.log_text())
                checked += 1
        print(f"{checked} files, cut at {cut_at}")
        assert checked
