"""`elgate doctor`: what it finds, and that it says what to do about it."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from click.testing import CliRunner

from elgate.daemon import doctor, topology
from elgate.daemon.commands import elgate
from elgate.daemon.config import Config, parse
from elgate.daemon.doctor import NOTE, OK, PROBLEM, Finding


def config_for(directory: Path, text: str = "") -> Config:
    routes = f"routes:\n  - {{name: a, match: {{path: {directory}/files/**}}}}\n"
    return parse(f"version: 1\nwal: {{dir: {directory}/wal, allow_volatile: true}}\n{text}{routes}", "test.yaml")


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_every_problem_says_what_to_do(disk_dir: Path) -> None:
    findings = doctor.examine(config_for(disk_dir))
    assert {"kernel", "processors", "ring", "log", "one durable write of 4 KiB", "route a"} <= by_name(findings).keys()
    for finding in findings:
        assert finding.verdict == OK or finding.advice, finding
    assert not list(disk_dir.rglob("*")), "it leaves nothing behind"


def test_a_route_whose_directory_is_missing(disk_dir: Path) -> None:
    assert by_name(doctor.examine(config_for(disk_dir)))["route a"].advice == f"mkdir -p {disk_dir}/files"
    (disk_dir / "files").mkdir()
    assert by_name(doctor.examine(config_for(disk_dir)))["route a"].verdict == OK


def test_a_test_stub_is_called_what_it_is(disk_dir: Path) -> None:
    findings = doctor.examine(config_for(disk_dir, "runtime: {mode: test_stub}\n"))
    assert findings[0].name == "mode" and "NOTHING" in findings[0].found and findings[0].advice
    assert "never synced" in by_name(findings)["log"].found
    assert "mode" not in by_name(doctor.examine(config_for(disk_dir)))


def test_a_route_where_no_attributes_can_be_set() -> None:
    assert not doctor._takes_attributes(Path("/proc/self"))


def test_an_old_kernel() -> None:
    assert doctor.kernel("5.15.0-91-generic").verdict == PROBLEM
    assert doctor.kernel("5.16.0").verdict == OK
    assert doctor.kernel("6.18.5").verdict == OK


def test_few_descriptors() -> None:
    assert doctor.descriptors((1024, 524288)).advice.endswith("ulimit -n 65536")
    assert doctor.descriptors((resource.RLIM_INFINITY, resource.RLIM_INFINITY)).verdict == OK


def test_a_ring_in_a_directory_that_is_not_there(disk_dir: Path) -> None:
    found = by_name(doctor.examine(config_for(disk_dir, f"ring: {{path: {disk_dir}/none/ring}}\n")))["ring"]
    assert found.verdict == PROBLEM
    assert "ring.path" in found.advice


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"a/b/cpu.max": "50000 100000", "a/cpu.max": "200000 100000"}, "0::/a/b", 0.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, "0::/a/b", 1.5),
        ({"a/cpu.max": "max 100000"}, "0::/a", None),
        (
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "25000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            "3:cpu,cpuacct:/a",
            0.25,
        ),
        ({"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/a", None),
        ({}, "0::/", None),
    ],
)
def test_quotas_of_cgroups(files: dict[str, str], membership: str, expected: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_text(membership + "\n")
    assert topology.cpu_quota(tmp_path / "cgroup", tmp_path / "mounted") == expected


def test_less_than_one_processor() -> None:
    found = list(doctor.processors(topology.Topology(8, 2, 0.5, 1)))
    assert found[0].verdict == NOTE
    assert "0.5" in found[0].found


def test_the_command(disk_dir: Path) -> None:
    (disk_dir / "files").mkdir()
    file = disk_dir / "elgate.yaml"
    file.write_text(
        f"version: 1\nwal: {{dir: {disk_dir}/wal, allow_volatile: true}}\n"
        f"routes:\n  - {{name: a, match: {{path: {disk_dir}/files/**}}}}\n"
    )
    runner = CliRunner()
    shown = runner.invoke(elgate, ["doctor", "--config", str(file)])
    result = runner.invoke(elgate, ["doctor", "--config", str(file), "--json"])
    findings = json.loads(result.stdout)["findings"]
    problems = [finding for finding in findings if finding["verdict"] == PROBLEM]
    assert result.exit_code == shown.exit_code == bool(problems), result.output
    for finding in findings:
        assert finding["name"].split()[0] in shown.stdout
    assert runner.invoke(elgate, ["doctor", "--config", str(disk_dir / "none.yaml")]).exit_code == 2
