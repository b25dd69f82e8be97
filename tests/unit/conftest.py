"""What unit tests of the vhost-user protocol share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.vhost_session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session.close()
