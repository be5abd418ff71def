"""The daemon's log: one line per event on stderr, for people (text) or for machines (json)."""

from __future__ import annotations

import json
import sys
import threading
from datetime import datetime, timezone
from typing import Any, Literal, TextIO

Level = Literal["info", "warning", "error"]
Format = Literal["text", "json"]


class Log:
    """Writes whole lines; any thread may call. A log that nobody can read any more stops nothing."""

    def __init__(self, line_format: Format = "text", stream: TextIO | None = None) -> None:
        self._format = line_format
        self._stream = stream if stream is not None else sys.stderr
        self._lock = threading.Lock()

    def write(self, level: Level, event: str, **fields: Any) -> None:
        line = format_event(self._format, datetime.now(timezone.utc), level, event, fields)
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                pass

    def engine_event(self, event: dict[str, Any]) -> None:
        """Writes an event as the engine gave it."""
        fields = dict(event)
        name = str(fields.pop("event", "event"))
        level = fields.pop("level", "info")
        self.write(level if level in ("info", "warning", "error") else "error", name, **fields)


def format_event(line_format: Format, time: datetime, level: str, event: str, fields: dict[str, Any]) -> str:
    stamp = time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if line_format == "json":
        return json.dumps({"time": stamp, "level": level, "event": event, **fields}, default=str)
    parts = [stamp, f"{level:<7}", event, *(f"{name}={_text_value(value)}" for name, value in fields.items())]
    return " ".join(parts)


def _text_value(value: Any) -> str:
    """Bare where that is unambiguous, else quoted: a name that a client chose cannot forge a line or a field."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    bare = text != "" and text.isprintable() and not any(character in ' "=' for character in text)
    return text if bare or not isinstance(value, str) else json.dumps(text)
