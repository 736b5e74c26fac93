import pytest
from ops_helpers import IMPLS, use


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """Each implementation that runs here."""
    return use(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned(poison):
    pass
