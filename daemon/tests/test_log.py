"""The log: one line per event, whatever a client put into it."""

from __future__ import annotations

import io
import json

from elgate.daemon.log import Log


def lines_of(line_format: str, **fields: object) -> list[str]:
    stream = io.StringIO()
    Log(line_format, stream).write("warning", "file_refused", **fields)
    return stream.getvalue().splitlines()


def test_text_is_one_readable_line() -> None:
    (line,) = lines_of("text", session=3, path="/a/b.log", reason="not on a route", routes=["a"], empty="")
    assert line.endswith('warning file_refused session=3 path=/a/b.log reason="not on a route" routes=["a"] empty=""')


def test_a_value_cannot_forge_a_line_or_a_field() -> None:
    (line,) = lines_of("text", path="/x\n2026-01-01 error faked=1", other='a" b="c')
    assert 'path="/x\\n2026-01-01 error faked=1"' in line
    assert 'other="a\\" b=\\"c"' in line


def test_json_is_one_object_per_line() -> None:
    (line,) = lines_of("json", path="/x\ny", count=2)
    event = json.loads(line)
    assert event["level"] == "warning"
    assert event["event"] == "file_refused"
    assert (event["path"], event["count"]) == ("/x\ny", 2)
    assert event["time"].endswith("Z")


def test_an_engine_event_keeps_its_fields_and_an_unknown_level_is_an_error() -> None:
    stream = io.StringIO()
    log = Log("json", stream)
    log.engine_event({"event": "session_opened", "level": "info", "session": 1})
    log.engine_event({"event": "odd", "level": "loud"})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["session"], first["level"]) == ("session_opened", 1, "info")
    assert second["level"] == "error"


def test_a_closed_log_stops_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    Log("text", stream).write("info", "ready")
