import sys

import pytest
import torch

LONGEST = (
    *("tests/ops/test_triton", "tests/test_real_model.py", "tests/vllm/"),
    *("tests/compression/", "tests/docs/", "tests/evals/", "tests/test_"),
)


def pytest_collection_modifyitems(items):
    """Runs the slowest files first, so that no process is left with one of them at the end."""

    def rank(item):
        found = [place for place, start in enumerate(LONGEST) if item.nodeid.startswith(start)]
        return min(found, default=len(LONGEST))

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sets one thread before the first shared fixture.

    Small tensors are faster so, and an artifact's bytes depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _still_one_thread(_one_thread):
    yield
    assert torch.get_num_threads() == 1, "a test changed the number of threads for those after it"


@pytest.fixture
def poison():
    """Fills with NaN the memory that torch allocates without writing it, so that its use shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub, which huggingface_hub in this process takes for the real one.

    huggingface_hub reads its variables on import; `hub.environment` is for child processes."""
    from hub_server import TOKEN, Hub
    from huggingface_hub import constants

    server = Hub()
    cache = tmp_path / "hub-cache"
    url = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.environment = {
        "HF_ENDPOINT": server.address,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    yield server
    server.close()


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command line in this process → (exit code, stdout, stderr)."""
    import deltacome.cli

    monkeypatch.setattr(deltacome.cli, "_debug", False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["deltacome", *map(str, arguments)])
        try:
            deltacome.cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
