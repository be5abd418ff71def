"""The commands of `elgate`. Each is thin: it reads its arguments, calls the module that does the work, and shows the
result, as a table for people or, with --json, as one JSON document for programs."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

# What one command alone needs is imported there: all of them wait for what stands here.

CONFIG_OPTION = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML file; without it: embedded defaults, no routes.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def elgate() -> None:
    """Elgate makes the files of unchanged programs durable, at memory speed."""


@elgate.command()
@CONFIG_OPTION
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--ready-fd", type=click.IntRange(min=0), help="Write 'ready' to this descriptor once serving, close it.")
@click.option("--until-stdin-ends", is_flag=True, help="Stop when nobody has the other end of stdin any more.")
@click.pass_context
def daemon(
    context: click.Context, config_path: Path | None, log_format: Any, ready_fd: int | None, until_stdin_ends: bool
) -> None:
    """Run the daemon in the foreground.

    SIGTERM or SIGINT drains and stops, SIGHUP reads the routes again.

    \b
    Exit codes:
      0  stopped, everything drained
      1  the engine could not start, or failed
      2  the configuration is wrong
      3  another daemon is running on this socket, ring or log
      4  stopped, not everything drained within 30 s; the next start finishes it
    """
    from elgate.daemon.log import Log
    from elgate.daemon.service import Service

    context.exit(int(Service(config_path, Log(log_format), ready_fd, until_stdin_ends).run()))


@elgate.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...]) -> None:
    """Run COMMAND with its files on Elgate's routes: elgate run -- python app.py"""
    arguments = hooked_command(command)
    if arguments is None:
        raise click.ClickException(
            f"'{command[0]}' is not a Python program, and this version hooks no others: the preload library for "
            f"any program is not built yet. It can be run as it is, without Elgate."
        )
    arguments = with_an_interpreter_that_has_elgate(arguments)
    try:
        os.execvp(arguments[0], arguments)
    except OSError as error:
        raise click.ClickException(f"cannot run '{arguments[0]}': {error.strerror}") from error


PYTHON_NAME = re.compile(r"python(\d+(\.\d+)?)?")
# Options of the interpreter that take their value from the next argument.
PYTHON_OPTIONS_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")


def hooked_command(command: tuple[str, ...]) -> list[str] | None:
    """The command with `-m elgate.run` in the right place, behind the interpreter's own options; None if it is not
    a Python program."""
    program = command[0]
    if program.endswith(".py"):
        return [sys.executable, "-m", "elgate.run", *command]
    if PYTHON_NAME.fullmatch(os.path.basename(program)) is None:
        return None
    index = 1
    while index < len(command) and command[index].startswith("-") and command[index][:2] not in ("-", "-m", "-c"):
        index += 2 if command[index] in PYTHON_OPTIONS_WITH_VALUE else 1
    return [program, *command[1:index], "-m", "elgate.run", *command[index:]]


BARE_PYTHON = ("python", "python3")
# Any directory of that name where it is called is found too, such as a clone, but is no file.
HAS_ELGATE = "import importlib.util, sys; sys.exit(getattr(importlib.util.find_spec('elgate'), 'origin', None) is None)"


def with_an_interpreter_that_has_elgate(arguments: list[str]) -> list[str]:
    """`arguments` as `hooked_command` made them. Raises ClickException where that interpreter cannot run elgate.run."""
    import shutil
    import subprocess

    options = arguments[1 : arguments.index("elgate.run") - 1]
    probe = [arguments[0], *options, "-c", HAS_ELGATE]
    try:
        if subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0:
            return arguments
    except OSError:
        return arguments  # which exec says better
    if arguments[0] in BARE_PYTHON:
        where = shutil.which(arguments[0])
        click.echo(f"elgate run: {where} has no elgate; {sys.executable} runs the program instead", err=True)
        return [sys.executable, *arguments[1:]]
    raise click.ClickException(
        f"'{arguments[0]}' has no package elgate, which hooks the program's files from within. Install it there "
        f"({arguments[0]} -m pip install PATH, where PATH is a clone of Elgate's repository), or name an interpreter "
        f"that has it, such as {sys.executable}."
    )


@elgate.command()
@JSON_OPTION
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """Is a daemon there for this user? Exit code 0 if so, 1 if not."""
    found = daemon_status()
    if as_json:
        click.echo(json.dumps(found))
    elif found["test_stub"]:
        click.echo("a TEST STUB serves this user: nothing is durable")
    elif found["connected"]:
        click.echo("a daemon serves this user")
    else:
        click.echo(f"no daemon serves this user: {found['reason']}")
    context.exit(0 if found["connected"] else 1)


def daemon_status() -> dict[str, Any]:
    """Connects as an application would, through the SDK, and says what came of it."""
    # A daemon that is not there is an answer here: no warning, and no waiting for it.
    os.environ["ELGATE_FALLBACK"] = "fail"
    os.environ.pop("ELGATE_DISABLE", None)
    from elgate import _native

    try:
        connected, reason = _native.start(), None
    except OSError as error:
        connected, reason = False, error.strerror
    return {
        "connected": connected,
        "test_stub": bool(_native.status()["test_stub"]),
        "reason": reason,
        "socket": os.environ.get("ELGATE_SOCKET"),
    }


@elgate.command()
@CONFIG_OPTION
@JSON_OPTION
@click.pass_context
def doctor(context: click.Context, config_path: Path | None, as_json: bool) -> None:
    """What this host has for Elgate, what was chosen, and what would improve it. Exit code 1 where something must be
    mended."""
    from elgate.daemon import config as configuration
    from elgate.daemon.doctor import PROBLEM, examine, show

    try:
        config = configuration.load(config_path)
    except configuration.ConfigurationError as error:
        click.echo(str(error), err=True)
        context.exit(2)
    findings = examine(config)
    if as_json:
        click.echo(json.dumps({"findings": [vars(finding) for finding in findings]}))
    else:
        show(findings)
    context.exit(1 if any(finding.verdict == PROBLEM for finding in findings) else 0)


@elgate.group("config")
def config_group() -> None:
    """Check and show the configuration."""


@config_group.command("check")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@JSON_OPTION
@click.pass_context
def config_check(context: click.Context, file: Path, as_json: bool) -> None:
    """Check FILE and list all that is wrong with it. Exit code 2 if anything is."""
    from elgate.daemon import config as configuration

    try:
        loaded = configuration.load(file)
    except configuration.ConfigurationError as error:
        if as_json:
            problems = [problem._asdict() for problem in error.problems]
            click.echo(json.dumps({"file": str(file), "ok": False, "problems": problems}))
        else:
            click.echo(str(error), err=True)
        context.exit(2)
    if as_json:
        click.echo(json.dumps({"file": str(file), "ok": True, "problems": []}))
    else:
        count = len(loaded.routes)
        click.echo(f"{file}: ok, {count} route{'' if count == 1 else 's'}")


@config_group.command("show")
@CONFIG_OPTION
@JSON_OPTION
@click.pass_context
def config_show(context: click.Context, config_path: Path | None, as_json: bool) -> None:
    """Show the effective configuration, defaults filled in, as YAML."""
    import yaml

    from elgate.daemon import config as configuration

    try:
        document = configuration.load(config_path).as_document()
    except configuration.ConfigurationError as error:
        click.echo(str(error), err=True)
        context.exit(2)
    if as_json:
        click.echo(json.dumps(document))
    else:
        click.echo(yaml.safe_dump(document, sort_keys=False), nl=False)


@elgate.command()
@click.argument("what", type=click.Choice(["ring", "wal", "disk"]))
@JSON_OPTION
def bench(what: str, as_json: bool) -> None:
    """Measure this machine: each figure beside its physical limit, from the same run."""
    from elgate.daemon.bench.figures import BENCHES
    from elgate.daemon.bench.report import show
    from elgate.daemon.child import DaemonFailed

    try:
        machine, rows = BENCHES[what](lambda text: click.echo(f"bench {what}: {text}", err=True))
    except (RuntimeError, OSError, DaemonFailed) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps({"machine": machine, "rows": [row.as_document() for row in rows]}))
    else:
        show(machine, rows)


@elgate.command()
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), help="Where to run it; must not exist.")
@click.option("--keep", is_flag=True, help="Leave files and logs for a look.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of stdout.")
@click.pass_context
def demo(context: click.Context, directory: Path | None, keep: bool, as_json: bool) -> None:
    """See an ordinary program become durable and faster, and survive SIGKILL. Takes about half a minute."""
    from elgate.daemon.demo.driver import run_demo

    context.exit(run_demo(directory, keep=keep, as_json=as_json))


@elgate.command()
@JSON_OPTION
def version(as_json: bool) -> None:
    """Show the versions of the package and of its native engine."""
    from importlib import metadata

    from elgate.daemon import engine

    package = metadata.version("elgate")
    if as_json:
        click.echo(json.dumps({"elgate": package, "engine": engine.version()}))
    else:
        click.echo(f"elgate {package}, engine {engine.version()}")
