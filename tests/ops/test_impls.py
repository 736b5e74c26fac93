"""Which implementation a device gets when nobody names one."""

import pytest
import torch

from deltacome.errors import UnsupportedError
from deltacome.ops.impls import fastest


@pytest.fixture
def gpu(monkeypatch):
    """Sets what torch says of a GPU that need not be there: its capability, and whether it is AMD's."""
    pytest.importorskip("triton")

    def says(capability, hip):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda", 0)

    return says


def test_kernels_run_on_nvidia_gpus_alone(gpu):
    """AMD's have a compute capability too, and torch calls them `cuda`."""
    assert fastest(gpu((9, 0), None)) == "triton"
    assert fastest(gpu((7, 5), None)) == "reference"
    assert fastest(gpu((9, 4), "6.4")) == "reference"


def test_others_are_refused(gpu, monkeypatch):
    launch = pytest.importorskip("deltacome.ops.triton_launch")
    monkeypatch.setattr(launch.knobs.runtime, "interpret", False)

    class Rows:
        dtype = torch.float16

    for capability, hip in (((7, 5), None), ((9, 4), "6.4")):
        Rows.device = gpu(capability, hip)
        with pytest.raises(UnsupportedError, match=r"an NVIDIA GPU of .*, got a GPU"):
            launch.check_gpu("bands", Rows)
    Rows.device = gpu((8, 0), None)
    launch.check_gpu("bands", Rows)
