"""The kernels' benchmarks: they check their results, and what they would print on a GPU is whole."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_helpers import INTERPRETED

from deltacome.format.spec import Band
from deltacome.ops import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*arguments, **environment):
    child = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


@pytest.mark.skipif(INTERPRETED, reason="the parent runs it")
def test_gpu_results_are_checked_in_the_interpreter():
    assert "checked" in run(BENCHMARKS / "gpu.py", "--check", TRITON_INTERPRET="1")


@pytest.mark.skipif(native.missing() is not None, reason="no C++ compiler")
@pytest.mark.skipif(INTERPRETED, reason="the parent runs it")
def test_cpu_page(tmp_path):
    page = tmp_path / "page.md"
    options = ("--shape", "64x128", "--rows", "1/1", "3/2", "--seconds", "0.01", "-o", page)
    run(BENCHMARKS / "cpu_bands.py", *options)
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| 64 × 128 |")]
    assert len(rows) == 6
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "Commit" in lines[4]


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py on the CPU: small shapes, every result checked, every time 1 µs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    for name, value in {
        "DEVICE": "cpu",
        "DTYPE": torch.float16,
        "SIZES": (256,),
        "LLAMA": {(192, 256): (Band(8, 2), Band(3, 4), Band(2, 9))},
        "BEYOND_CACHE": 0,
        "graph_time": lambda calls: (calls(), 1.0)[1],
        "event_time": lambda call, repeats: (call(), 2.0)[1],
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.skipif(not INTERPRETED, reason="test_triton.py runs it in a process that interprets")
def test_gpu_tables_are_whole(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROWS", (1, 3))
    monkeypatch.setattr(gpu, "TENANTS", (1, 4))
    monkeypatch.setattr(gpu, "PREFILL", (8,))
    limits = gpu.Limits.__new__(gpu.Limits)
    limits.copy, limits.matmul = 1e12, 1e15
    parts = {
        "figure3": gpu.figure3(limits, tmp_path / "page"),
        "decode": gpu.decode(limits),
        "tenants": gpu.tenants(limits, 8),
        "prefill": gpu.prefill(limits),
    }
    for name, part in parts.items():
        lines = "\n".join(part).splitlines()
        assert len({line.count("|") for line in lines}) == 1, name
        if name == "figure3":
            continue
        for peer in ("bands", "signs (BitDelta)", "PyTorch", "LoRA, rank 64", "base matmul"):
            assert any(f"| {peer}" in line for line in lines), (name, peer)
    assert (tmp_path / "page.png").stat().st_size > 1000


@pytest.mark.skipif(not INTERPRETED, reason="test_triton.py runs it in a process that interprets")
def test_a_wrong_result_is_not_timed(gpu):
    deltas = gpu.Deltas((64, 128), (Band(2, 3),), 1, "cpu", one=True)
    x_TI = torch.randn(2, 128, dtype=torch.float16)
    rows = gpu.group_rows(torch.zeros(2, dtype=torch.int64), 1)
    gpu.check(deltas, x_TI, rows)
    deltas.dense[0][3] += 1
    with pytest.raises(SystemExit, match="wrong result"):
        gpu.check(deltas, x_TI, rows)
