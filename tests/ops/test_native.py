"""The library of the CPU kernels: built, found, and missing."""

import multiprocessing
import resource
from pathlib import Path

import pytest
import torch
from ops_helpers import PLANS, filled, filled_signs, hatch_build, randn, rows_of

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.ops import native
from deltacome.ops.bands import bands, cpu, many
from deltacome.ops.rows import Rows
from deltacome.ops.signs import signs

COMPILER = hatch_build.compiler()


STATM = Path("/proc/self/statm")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", hatch_build.instruction_sets())
def test_a_compiler_means_a_library_of_this_source(isa):
    # If this fails after a change of native.cpp: python hatch_build.py
    assert native.library(isa).deltacome_source().decode() == hatch_build.source_digest()


def test_without_a_library_it_is_an_error(by_python, monkeypatch):
    table, _ = filled(140, [70], PLANS)
    y_TO = torch.zeros(2, 70)
    monkeypatch.setattr(native, "default_isa", lambda: "absent")
    native.missing.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match=r"install a C\+\+ compiler"):
            bands(y_TO, randn(2, 140).cpu(), rows_of([0, 1], table), table, impl="cpu")
    finally:
        native.missing.cache_clear()
    assert not y_TO.any()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_what_c_could_not_walk():
    table, _ = filled(140, [70], PLANS)
    y_TO, x_TI, rows = torch.zeros(2, 70), randn(2, 140).cpu(), rows_of([0, 1], table)
    blobs, fields = table.pool.blobs_SN, table.fields_SPBF

    def call(y=y_TO, slot=rows.slot_T, blobs=blobs, fields=fields):
        cpu.bands(y, x_TI, slot, blobs, fields, table.outs, 128)

    with pytest.raises(MismatchError, match="on the CPU"):
        call(y=y_TO.to("meta"))
    with pytest.raises(MismatchError, match="int32 slots"):
        call(slot=rows.slot_T.long())
    with pytest.raises(MismatchError, match="contiguous"):
        call(blobs=blobs.T.contiguous().T)
    with pytest.raises(MismatchError, match="contiguous"):
        call(fields=fields.transpose(2, 3).contiguous().transpose(2, 3))
    for slot in (-2, 3):
        with pytest.raises(MismatchError, match=r"\[-1, 3\)"):
            call(slot=torch.tensor([0, slot], dtype=torch.int32))
    assert not y_TO.any()
    with pytest.raises(RuntimeError, match="memory"):  # torch's own error for outputs that overlap
        call(y=torch.zeros(1, 70).expand(2, 70))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("slot", [-2, 3])
def test_nothing_is_added_where_a_slot_is_not_there(slot, monkeypatch):
    """Many rows are otherwise added to before the kernel looks at the slots."""
    monkeypatch.setattr(many, "MANY", 4)
    monkeypatch.setattr(many, "_has_bfloat16", lambda: True)
    table, _ = filled(140, [70], PLANS)
    y_TO, x_TI = torch.zeros(9, 70, dtype=torch.bfloat16), randn(9, 140, dtype=torch.bfloat16).cpu()
    slot_T = torch.tensor([0] * 5 + [slot] * 4, dtype=torch.int32)
    with pytest.raises(MismatchError, match=r"\[-1, 3\)"):
        cpu.bands(y_TO, x_TI, slot_T, table.pool.blobs_SN, table.fields_SPBF, table.outs, 128)
    assert not y_TO.any()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_c_gets_memory_of_the_cpu_whatever_the_default_device():
    table, _ = filled(140, [70], PLANS)
    with torch.device("meta"):  # stands in for a GPU
        blobs, fields = table.pool.blobs_SN, table.fields_SPBF
        piece_RN = many._decode(0, blobs, fields, native.sizes((70,)), 140, 128, False, 0, 1, 0, 64)
    assert piece_RN.is_cpu
    assert piece_RN.float().any()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_plain_batches_do_not_enter_python(monkeypatch):
    entered = []
    monkeypatch.setattr(cpu, "bands", lambda *arguments: entered.append(arguments))
    table, _ = filled(140, [70], PLANS)
    expected, y_TO, x_TI = torch.zeros(2, 70), torch.zeros(2, 70), randn(2, 140).cpu()
    bands(expected, x_TI, rows_of([0, 1], table), table)
    bands(y_TO, x_TI, rows_of([0, 1], table), table, impl="cpu")
    torch.testing.assert_close(y_TO, expected)
    assert not entered
    for y, x, slots in (
        (y_TO.half(), x_TI.half(), [0, 1]),
        (torch.zeros(70, 2).T, x_TI, [0, 1]),
        (y_TO, x_TI, [0, 3]),
        (torch.zeros(many.MANY, 70), randn(many.MANY, 140).cpu(), many.MANY * [0]),
    ):
        slot_T = torch.tensor(slots, dtype=torch.int32)
        bands(y, x, Rows(slot_T, slot_T, slot_T, 1), table, impl="cpu")
        assert len(entered) == 1
        entered.clear()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_what_python_raises_comes_back_through_c(by_python, monkeypatch, kind):
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        raise kind

    monkeypatch.setattr(cpu, "bands", fails)
    table, _ = filled(140, [70], PLANS)
    x_TI = randn(2, 140).cpu()
    with pytest.raises(kind):
        bands(torch.zeros(2, 70), x_TI, rows_of([0, 1], table), table, impl="cpu")
    assert len(calls) == 1


@pytest.mark.parametrize(("command", "says"), [("/no/compiler", "no C++"), ("false", "without")])
def test_the_build_goes_on_without_a_compiler(command, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "_native_portable.so").write_bytes(b"of an older build")
    monkeypatch.setenv("CXX", command)
    assert hatch_build.build(tmp_path) == []
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(COMPILER is None or not STATM.exists(), reason="no C++ compiler, or no /proc")
def test_memory_of_a_long_prompt_is_given_back():
    # In a process of its own, since what other tests hold comes and goes.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        least, most, after = pool.apply(memory_after, ([1, 4096, 1],))
    assert most > least + (100 << 20)
    assert after < least + (50 << 20)


def memory_after(batches):
    """Bytes that the process holds after a batch of each size."""
    table, _ = filled_signs(8192, [32])
    held = []
    for tokens in batches:
        y_TO, x_TI = torch.zeros(tokens, 32), randn(tokens, 8192).cpu()
        signs(y_TO, x_TI, rows_of(tokens * [0], table), table, impl="cpu")
        del y_TO, x_TI
        held.append(int(STATM.read_text().split()[1]) * resource.getpagesize())
    return held
