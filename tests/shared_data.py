"""The folder of real benchmark inputs beside a checkout, for tests that use it where it is."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(*parts: str) -> Path:
    """A file or folder of the benchmark inputs; the test is skipped, with the reason, where it is not there."""
    path = FOLDER.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no benchmark inputs beside this checkout ({'/'.join(parts) or 'shared/data'})")
    return path
