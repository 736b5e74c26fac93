import pytest
from runtime_helpers import CONFIGS, make_base


@pytest.fixture(autouse=True)
def _poisoned(poison):
    """Poisons memory in all tests of this room."""


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Name → folder of a tiny random checkpoint, made when first asked for."""

    class Bases(dict):
        def __missing__(self, name):
            folder = tmp_path_factory.mktemp(name)
            make_base(name, folder)
            self[name] = folder
            return folder

    assert CONFIGS
    return Bases()
