"""LongBench's rows from a local folder, or from the public files on the Hugging Face hub.

A folder may hold, directly or in ``longbench/`` or ``data/``: ``<task>.jsonl``, ``<task>.parquet`` or
``<task>/*.parquet`` (in the layout of Xnhyacinth/LongBench, which calls ``input`` ``question``), or the original
``data.zip``. For v2, directly or in ``longbench_v2/``: ``data.json``, ``*.jsonl`` or ``*.parquet``; files called
``*no_context*`` hold questions alone and are not read.
"""

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longfit.errors import DataError

Row = dict[str, Any]

_V1_HUB, _V2_HUB = ("THUDM/LongBench", "data.zip"), ("THUDM/LongBench-v2", "data.json")
_V1_FIELDS: Mapping[str, type] = {"input": str, "context": str, "answers": list, "length": int}
_V2_FIELDS: Mapping[str, type] = dict.fromkeys(
    ["question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "context", "difficulty", "length"], str
)


def load_rows(name: str, data: str | Path | None = None) -> list[Row]:
    """All rows of a v1 or LongBench-E task, in file order.

    Raises:
        DataError: no file, a broken line, a missing field, or the download failed.
    """
    if data is None:
        return _from_zip(_download(*_V1_HUB, f"{name}.jsonl"), name)
    for root in _roots(data, "longbench", "data"):
        if (lines := root / f"{name}.jsonl").is_file():
            return _rows(_parse_lines(_text(lines), str(lines)), _V1_FIELDS, lines)
        tables = [file for file in [root / f"{name}.parquet"] if file.is_file()] or sorted(
            root.glob(f"{name}/*.parquet")
        )
        if tables:
            return _rows(_parse_tables(tables), _V1_FIELDS, tables[0])
        if (archive := root / "data.zip").is_file():
            return _from_zip(archive, name)
    raise DataError(
        f"{data} holds no {name}.jsonl: put LongBench's {name}.jsonl, {name}.parquet or the whole data.zip of "
        f"huggingface.co/datasets/{_V1_HUB[0]} there, or into its folder longbench"
    )


def load_v2_rows(data: str | Path | None = None) -> list[Row]:
    """All rows of LongBench v2, in file order, files by name, each question once.

    Raises:
        DataError: as `load_rows`.
    """
    roots = [_download(*_V2_HUB, "data.json").parent] if data is None else _roots(data, "longbench_v2")
    for root in roots:
        whole, lines, tables = (sorted(root.glob(pattern)) for pattern in ("data.json", "*.jsonl", "*.parquet"))
        lines = [file for file in lines if "no_context" not in file.name]
        if whole:
            rows = _rows(_parse_whole(whole[0]), _V2_FIELDS, whole[0])
        elif lines:
            parsed = (item for file in lines for item in _parse_lines(_text(file), str(file)))
            rows = _rows(parsed, _V2_FIELDS, lines[0])
        elif tables:
            rows = _rows(_parse_tables(tables), _V2_FIELDS, tables[0])
        else:
            continue
        return list({row.get("_id", number): row for number, row in enumerate(rows)}.values())
    raise DataError(
        f"{data} holds no LongBench v2: put data.json of huggingface.co/datasets/{_V2_HUB[0]}, or its rows as .jsonl, "
        f"there, or into its folder longbench_v2"
    )


def _roots(data: str | Path, *inner: str) -> list[Path]:
    folder = Path(data)
    if not folder.is_dir():
        raise DataError(f"data folder {str(data)!r} does not exist; give a folder of LongBench's files, or none")
    return [root for root in (*(folder / name for name in inner), folder) if root.is_dir()]


def _download(repo: str, file: str, wanted: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise DataError(
            f"{file} of huggingface.co/datasets/{repo} could not be downloaded ({type(error).__name__}: {error}); "
            f"fetch it elsewhere and give the folder that holds it, or {wanted}, as data"
        ) from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error}); fetch it again") from error


def _from_zip(archive: Path, name: str) -> list[Row]:
    try:
        with zipfile.ZipFile(archive) as opened:
            member = next((n for n in opened.namelist() if n.rpartition("/")[2] == f"{name}.jsonl"), None)
            text = opened.read(member).decode() if member else None
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise DataError(f"{archive} is broken ({error}); fetch LongBench's data.zip again") from error
    if text is None:
        raise DataError(
            f"{archive} holds no {name}.jsonl; it should be data.zip of huggingface.co/datasets/{_V1_HUB[0]}"
        )
    return _rows(_parse_lines(text, f"{archive}:{member}"), _V1_FIELDS, f"{archive}:{member}")


def _parse_lines(text: str, source: str) -> Iterable[tuple[str, Any]]:
    # Texts hold U+2028 and its kin unescaped: only "\n" ends a row.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{source}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{source}, line {number} is not JSON ({error}); fetch the file again") from error


def _parse_whole(file: Path) -> Iterable[tuple[str, Any]]:
    try:
        rows = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(rows, list):
        raise DataError(f"{file} should be a list of questions, as LongBench v2's data.json is")
    return [(f"{file}, row {number}", row) for number, row in enumerate(rows)]


def _parse_tables(files: Iterable[Path]) -> Iterable[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet files need pyarrow (pip install pyarrow); LongBench's .jsonl files do not") from error
    for file in files:
        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except pyarrow.ArrowException as error:
            raise DataError(f"{file} is not a parquet file ({error}); fetch it again") from error
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows))


def _rows(parsed: Iterable[tuple[str, Any]], fields: Mapping[str, type], source: str | Path) -> list[Row]:
    """The rows, each with all `fields` of their type; `question` stands in for a missing `input`."""
    rows = []
    for place, row in parsed:
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row is a JSON object, not {type(row).__name__}")
        if "input" in fields and "input" not in row and "question" in row:
            row = {**row, "input": row["question"]}
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise DataError(f"{place}: field {name!r} should be {kind.__name__}; is this a LongBench file?")
        rows.append(row)
    if not rows:
        raise DataError(f"{source} is empty; fetch it again")
    return rows
