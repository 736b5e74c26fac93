import pytest
from tiny_pairs import make_pair, text_lines


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Family → folders (base, tuned), made when first asked for. Tests do not change them."""

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
