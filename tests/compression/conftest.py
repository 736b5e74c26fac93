import pytest
import torch
from tiny_pairs import make_pair, text_lines


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """For the session: artifacts that tests share are made before any fixture of a single test, and
    bytes hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Family → folders (base, tuned), made when first asked for. Tests leave them as they are."""

    class Pairs(dict):
        def __missing__(self, family):
            self[family] = make_pair(family, tmp_path_factory.mktemp(family))
            return self[family]

    return Pairs()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A .txt file with calibration text."""
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text("\n".join(text_lines(60, seed=3)))
    return str(file)
