"""Every configuration of every kernel compiled for GPUs that need not be there.

No register may spill, shared memory must leave room for a second program, and tensor cores must be used
where they are meant to be. This runs in processes of their own, since Triton either interprets or
compiles, and decides once.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

CHILD = """
import re
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deltacome.ops.bands import triton as bands
from deltacome.ops.norm import triton as norm
from deltacome.ops.signs import triton as signs

dtype, capability = sys.argv[1], int(sys.argv[2])
POINTERS = {
    "x_ptr": dtype, "y_ptr": dtype, "t_ptr": "fp32", "order_ptr": "i32", "tiles_ptr": "i32",
    "blobs_ptr": "u8", "table_ptr": "i64", "fields_ptr": "i64", "ids_ptr": "i64", "slot_ptr": "i32",
    "weights_ptr": "fp32",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNEVEN = ("out", "size")  # not multiples of 16, as far as the compiler knows


def build(name, kernel, constants, **options):
    constants = constants | {"x_stride_i": 1, "y_stride_o": 1, "x_stride_h": 1, "y_stride_h": 1}
    signature, values, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[place,] = "constexpr", constants[argument]
        elif argument in ("eps", "output_scale"):
            signature[argument] = "fp32"
        else:
            pointer = POINTERS.get(argument)
            signature[argument] = f"*{pointer}" if pointer else "i32"
            if argument not in UNEVEN:  # what a launch finds for aligned tensors
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    print("kernel", name)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})
    ptx = compiled.asm["ptx"]
    # Hopper multiplies large tiles by wgmma.
    cores = ptx.count("mma.sync") + ptx.count("wgmma.mma_async")
    print("shared", compiled.metadata.shared, "tensor cores", cores)
    print("rounds", len(re.findall(r"cvt\\.rn\\.(?:b?f16)(?:x2)?\\.f32", ptx)))


OUTS = {"OUTS": (4096, 1024, 1024), "PARTS": 3}
SMALLER = ((1, 1), (1, bands.SPLITS), (16, 1), (16, bands.SPLITS))
for tile, splits in (*(() if sys.argv[3] == "largest" else SMALLER), (64, 1)):
    common = {
        "GROUP": 128, "TILE": tile, "DIRECTIONS": bands.DIRECTIONS,
        "CHUNK": bands.chunk_size(tile, 128), "SPLITS": splits,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    expand = common | OUTS | {"BANDS": 4, "SIDE": 7}
    for name, kernel, configs, constants in (
        ("shrink", bands.shrink, bands.SHRINKS, common | {"BANDS": 12}),
        ("expand", bands.expand, bands.EXPANDS, expand),
    ):
        for config in configs[tile]:
            options = {
                "num_warps": config.warps, "maxnreg": config.registers,
                "num_stages": 1 if dtype == "fp32" else config.stages,
            }
            build(f"{name} {tile} {splits} {config}", kernel, constants, **options)
    if splits == 1:
        build(f"gather {tile}", bands.gather, common | {"BANDS": 4})
for tile in (16, 64):
    for warps, stages, outputs, chunk in signs.CONFIGS[DTYPES[dtype]]:
        constants = OUTS | {"TILE": tile, "OUTPUTS": outputs, "CHUNK": chunk}
        name = f"signs {tile} {warps} {stages}"
        build(name, signs.multiply, constants, num_warps=warps, num_stages=stages)
for size in (1024, 8192, 16384):
    build(f"norm {size}", norm.normalise, {"SIZE": size}, num_warps=norm.WARPS)
"""
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory of a multiprocessor, by compute capability."""
CASES = [("bf16", 90, "all"), ("fp16", 80, "largest"), ("fp32", 80, "all")]
"""Each dtype once, since each takes minutes; fp16, which is as wide as bf16, only with the largest tiles,
where there is least memory."""


def compile_all(case, folder):
    environment = os.environ | {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, case)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Case → the process that compiled it; two at a time."""
    folders = {case: tmp_path_factory.mktemp("cache") for case in CASES}
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(compile_all, CASES, folders.values())
        return dict(zip(CASES, done, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_configuration(children, case):
    child, (dtype, capability, tiles) = children[case], case
    assert child.returncode == 0, child.stderr
    reports = child.stdout.split("kernel ")[1:]
    assert len(reports) >= (20 if tiles == "all" else 8)
    for report in reports:
        name, tile = report.split()[:2]
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
        assert len(spills) == 2, report
        assert set(spills) == {"0"}, report
        (used,) = re.findall(r"shared (\d+)", report)
        # A program alone on a multiprocessor would hide no latency: leave room for two.
        assert int(used) <= SHARED[capability] // 2, report
        multiplies = name == "signs" or (
            name in ("shrink", "expand") and tile != "1" and dtype != "fp32"
        )
        assert ("tensor cores 0" not in report) == multiplies, report
        # Outputs are rounded to nearest, which the interpreter cannot show.
        if dtype != "fp32" and name in ("expand", "signs", "norm"):
            assert "rounds 0" not in report, report
