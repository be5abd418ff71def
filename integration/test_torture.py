"""Programs that do with their files whatever programs do, while the daemon is killed again and again."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from elgate.daemon.child import ChildDaemon
from integration.programs import LIMIT_S

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


@pytest.mark.parametrize("mode", MODES)
def test_every_file_is_what_its_program_has_made_it(mode: object, elgate_daemon: ChildDaemon) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    programs = [
        subprocess.Popen(
            [
                sys.executable,
                str(PROGRAM),
                str(elgate_daemon.route_dir / f"program-{number}"),
                str(seed + number),
                str(OPERATIONS),
            ],
            env=elgate_daemon.env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(PROGRAMS)
    ]
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
