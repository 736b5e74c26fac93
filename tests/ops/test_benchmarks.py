"""The kernels' benchmarks: they check their results, and what they would print on a GPU is complete."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_helpers import INTERPRETED

from deltacome.format.spec import Band, codes_nbytes
from deltacome.ops import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="test_triton.py runs it in a process that interprets"
)


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


def imported(name, monkeypatch):
    """A benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_a_bare_machine_says_what_it_can(monkeypatch, tmp_path):
    """Bare means with a GPU and the sources, but with neither git nor our package."""
    origin = imported("origin", monkeypatch)
    assert "Commit unknown" not in origin.origin()

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(origin, "version", version)
    said = origin.origin("triton")
    assert said.startswith("Commit unknown; deltacome unknown, torch unknown, triton unknown;")


def test_a_page_quotes_its_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/where/soak.py", "work/base", "-o", "a b.md"])
    said = imported("origin", monkeypatch).command(Path("work/base"))
    assert said == "python benchmarks/soak.py BASE -o 'a b.md'"


@pytest.mark.skipif(INTERPRETED, reason="the parent runs it")
def test_gpu_needs_torch_alone():
    """Nothing has to be installed on a machine that has torch and Triton."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu; print(*sys.modules)"
    modules = run("-c", code).split()
    assert "deltacome.ops.bands.api" in modules
    others = ("accelerate", "huggingface_hub", "psutil", "rich", "safetensors", "scipy")
    assert not {*others, "matplotlib", "transformers", "typer"} & {*modules}


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py on the CPU: small shapes, every result checked, every time 1 µs."""
    module = imported("gpu", monkeypatch)
    for name, value in {
        "DEVICE": "cpu",
        "DTYPE": torch.float16,
        "SIZES": (232,),
        "ROWS": (1, 3),
        "LLAMA": {(70, 130): (Band(8, 2), Band(3, 4), Band(2, 9))},
        "DECODE": (1, 2),
        "BATCH": 2,
        "TENANTS": (2,),
        "PREFILL": (3,),
        "BEYOND_CACHE": 0,
        "graph_time": lambda calls: (calls(), 1.0)[1],
        "event_time": lambda call, repeats: (call(), 2.0)[1],
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def limits(gpu):
    limits = gpu.Limits.__new__(gpu.Limits)
    limits.copy, limits.matmul = 1e12, 1e15
    return limits


@interpreted
def test_gpu_results_are_checked(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--check"])
    gpu.main()
    assert "checked" in capsys.readouterr().out


@interpreted
def test_gpu_tables_are_whole(gpu, limits, tmp_path):
    assert gpu.measure(gpu.PARTS, tmp_path / "new" / "page", limits)
    head, *parts = (tmp_path / "new" / "page.md").read_text(encoding="utf-8").split("\n## ")
    assert "Commit" in head
    assert [part.split()[0] for part in parts] == list(gpu.PARTS)
    for name, part in zip(gpu.PARTS, parts, strict=True):
        lines = part.splitlines()[2:]
        assert len({line.count("|") for line in lines}) == 1, name
        if name == "figure3":
            assert len(lines) == 4
            continue
        for peer in ("bands", "signs (BitDelta)", "PyTorch", "LoRA, rank 64", "base matmul"):
            assert any(f"| {peer}" in line for line in lines), (name, peer)
    assert (tmp_path / "new" / "page.png").stat().st_size > 1000


@interpreted
def test_gpu_tables_outlive_a_part_that_fails(gpu, limits, tmp_path, monkeypatch):
    """They also outlive the absence of matplotlib."""

    def fails(limits):
        yield "| one |"
        assert "| one |" in page.read_text(encoding="utf-8")
        raise torch.cuda.OutOfMemoryError("too little")

    page = tmp_path / "page.md"
    monkeypatch.setattr(gpu, "ROWS", (1,))
    monkeypatch.setattr(gpu, "decode", fails)
    monkeypatch.setattr(gpu, "tenants", lambda limits: iter(["| two |"]))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not gpu.measure(("figure3", "decode", "tenants"), tmp_path / "page", limits)
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "| 232 | 1 |" in line]
    assert "It ends here: OutOfMemoryError: too little" in lines
    assert "| two |" in lines
    assert lines[-1].startswith("Figure 3 was not drawn: ")


def test_the_plan_of_figure_3(monkeypatch):
    """Codes of one bit per entry, as the paper counts them; at 4096, the paper's own plan."""
    gpu = imported("gpu", monkeypatch)
    assert gpu.figure3_plan(4096) == gpu.LLAMA[4096, 4096]
    for size in gpu.SIZES:
        assert codes_nbytes((size, size), gpu.figure3_plan(size)) == size * size / 8


def test_figure_3_has_the_tiles_that_an_engine_takes(gpu, limits, monkeypatch):
    tiles = []
    monkeypatch.setattr(gpu, "time_deltas", lambda deltas, x_TI, rows: tiles.append(rows.tile) or 1)
    monkeypatch.setattr(gpu, "ROWS", (1, 2, 64))
    assert len(list(gpu.figure3(limits, {}))) == 4
    assert tiles == [1, 16, 16]


def test_what_is_checked_is_what_is_timed(gpu):
    """Another dtype of y would be another kernel, which takes as long to compile."""
    dtypes = []

    def op(y_TO, x_TI, rows, table, *, impl):
        dtypes.append((y_TO.dtype, impl))
        y_TO += x_TI @ deltas.dense[0].to(x_TI.dtype).T

    deltas = gpu.of_bands((64, 128), (Band(2, 3),), 1, 1, "cpu")
    deltas.op = op
    rows = gpu.group_rows(torch.zeros(2, dtype=torch.int64), 1)
    gpu.time_deltas(deltas, torch.randn(2, 128, dtype=torch.float16), rows)
    assert dtypes == [(torch.float16, "triton")] * 2


@interpreted
def test_a_wrong_result_is_not_timed(gpu):
    deltas = gpu.of_bands((64, 128), (Band(2, 3),), 1, 1, "cpu")
    x_TI = torch.randn(2, 128, dtype=torch.float16)
    rows = gpu.group_rows(torch.zeros(2, dtype=torch.int64), 1)
    gpu.check(deltas, x_TI, rows)
    wrong = deltas.dense[0].clone()
    wrong[3] *= 1.1
    deltas.dense = [wrong]
    with pytest.raises(SystemExit, match="wrong result"):
        gpu.check(deltas, x_TI, rows)
