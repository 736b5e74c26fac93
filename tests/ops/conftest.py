import pytest
from ops_helpers import IMPLS, use

from deltacome.ops import native


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """Each implementation that runs here."""
    few = native.few_rows(0)
    native.few_rows(few)
    yield use(request.param, monkeypatch)
    native.few_rows(few)


@pytest.fixture
def by_python():
    """Ops go through Python, whether or not the library has taken them over."""
    few = native.few_rows(0)
    yield
    native.few_rows(few)


@pytest.fixture(autouse=True)
def _poisoned(poison):
    pass
