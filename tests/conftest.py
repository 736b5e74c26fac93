import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """From before the first shared fixture on: small tensors are quicker so, and bytes of an artifact
    hang on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _still_one_thread(_one_thread):
    yield
    assert torch.get_num_threads() == 1, "a test changed the number of threads for those after it"


@pytest.fixture
def poison():
    """Fills memory that torch allocates without writing it with NaN, so that it shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
