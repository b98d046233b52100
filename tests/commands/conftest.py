"""Each test of a command runs in a folder of its own."""

import pytest


@pytest.fixture(autouse=True)
def _everywhere(own_folder):
    """See `tests.shared`."""
