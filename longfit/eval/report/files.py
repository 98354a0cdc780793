"""Writing a report's files so that a reader sees the old file or the new one, never a part."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write ``content`` to a temporary file beside ``path`` and move it there; makes the folder. Returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)
    return path


def write_rows(folder: Path, rows: Sequence[dict[str, Any]], name: str = "summary") -> list[Path]:
    """``name``.json with the rows as they are, and ``name``.csv with nested values as JSON and None empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_flat(row.get(column)) for column in columns] for row in rows)
    return [
        write_atomically(folder / f"{name}.csv", text.getvalue()),
        write_atomically(folder / f"{name}.json", json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n"),
    ]


def _flat(value: Any) -> Any:
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if isinstance(value, dict | list) else value
