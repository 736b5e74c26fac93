"""The kernels compiled for GPUs that need not be there: no register spills, shared memory in bounds.

In processes of their own: Triton either interprets or compiles, and decides once.
"""

import os
import re
import subprocess
import sys

import pytest

CHILD = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deltacome.ops.grouped import triton as kernels

dtype, (capability, size, *tiles) = sys.argv[1], map(int, sys.argv[2:])
pointers = {
    "x_ptr": dtype, "y_ptr": dtype, "t_ptr": "fp32", "order_ptr": "i32", "tiles_ptr": "i32",
    "blobs_ptr": "u8", "table_ptr": "i64",
}
for tile in tiles:
    config = kernels.CONFIGS[tile]
    for name in ("shrink", "expand"):
        kernel = getattr(kernels, name)
        constants = {
            "SIZE": size, "BANDS": 4, "MAX_RANK": 1024, "GROUP": 128, "TILE": tile,
            "DIRECTIONS": kernels.DIRECTIONS,
            "CHUNK": kernels.chunk_size(tile, 128),
            "SPLITS": kernels.MAX_SPLITS if tile == 16 else 1,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32", "x_stride_i": 1, "y_stride_o": 1,
        }
        signature, values, attributes = {}, {}, {}
        for place, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument], values[place,] = "constexpr", constants[argument]
                continue
            signature[argument] = f"*{pointers[argument]}" if argument in pointers else "i32"
            if argument != "tokens":  # what a launch finds for aligned tensors
                attributes[place,] = [["tt.divisibility", 16]]
        options = {
            "num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers,
            "enable_fp_fusion": True,
        }
        source = ASTSource(kernel, signature, values, attributes)
        print("kernel", name, tile)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = compiled.asm["ptx"]
        print("shared", compiled.metadata.shared, "tensor cores", ptx.count("mma.sync"))
        print("rounds", len(re.findall(r"cvt\\.rn\\.(?:b?f16)(?:x2)?\\.f32", ptx)))
"""
CASES = [
    # dtype, capability, bytes of shared memory of a multiprocessor, size, tiles
    ("bf16", 80, 163 * 1024, 11008, (1, 64)),
    ("fp16", 90, 227 * 1024, 4096, (16,)),
]


@pytest.mark.parametrize(("dtype", "capability", "shared", "size", "tiles"), CASES)
def test_compiled_ahead_of_time(dtype, capability, shared, size, tiles, tmp_path):
    environment = os.environ | {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, dtype, *map(str, (capability, size, *tiles))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    reports = child.stdout.split("kernel ")[1:]
    assert len(reports) == 2 * len(tiles)
    for report in reports:
        name, tile = report.split()[:2]
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
        assert len(spills) == 2, report
        assert set(spills) == {"0"}, report
        (used,) = re.findall(r"shared (\d+)", report)
        # A program alone on a multiprocessor would hide no latency: leave room for two.
        assert int(used) <= shared // 2, report
        cores = "tensor cores 0" not in report
        assert cores == (tile != "1"), report
        # Outputs are rounded to nearest, which the interpreter cannot show.
        assert "rounds 0" not in report or name == "shrink", report
