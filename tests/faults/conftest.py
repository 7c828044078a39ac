"""One small world for all fault tests of the encode job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.encode_world import make_world


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("faults"))
