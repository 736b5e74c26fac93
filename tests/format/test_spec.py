import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltacome.errors import PlanError
from deltacome.format.spec import (
    ALIGN,
    WIDTHS,
    Band,
    band_sections,
    bands_nbytes,
    codes_nbytes,
    format_plan,
    rank,
)

BYTES = {"int32": 4, "float32": 4, "float16": 2, "uint8": 1}
PLANS = st.lists(
    st.builds(Band, st.sampled_from(WIDTHS), st.integers(1, 50)), min_size=1, max_size=4
).map(tuple)


@given(st.tuples(st.integers(1, 400), st.integers(1, 400)), PLANS, st.sampled_from([1, 32, 128]))
def test_sections_follow_each_other_without_overlap(shape, plan, group):
    bands, nbytes = band_sections(shape, plan, group)
    end = 0
    for section in (section for sections in bands for section in sections):
        assert section.offset == -(-end // ALIGN) * ALIGN
        assert section.nbytes == math.prod(section.shape) * BYTES[section.dtype]
        end = section.offset + section.nbytes
    assert nbytes == -(-end // ALIGN) * ALIGN == bands_nbytes(shape, plan, group)
    assert [sections[-1].name for sections in bands] == ["s"] * len(plan)
    # All of it is codes, except scales, zero points, singular values and padding.
    assert codes_nbytes(shape, plan) <= nbytes


def test_order_of_sections():
    (sections, full), _ = band_sections((130, 65), (Band(3, 2), Band(16, 1)))
    assert [(s.name, s.dtype, s.shape) for s in sections] == [
        ("v.codes2", "int32", (2, 8)),
        ("v.codes1", "int32", (2, 4)),
        ("v.scale", "float16", (2, 1)),
        ("v.zero", "uint8", (2, 1)),
        ("u.codes2", "int32", (2, 12)),
        ("u.codes1", "int32", (2, 6)),
        ("u.scale", "float16", (2, 2)),
        ("u.zero", "uint8", (2, 2)),
        ("s", "float32", (2, 1)),
    ]
    assert [s.offset for s in sections] == [0, 64, 96, 112, 128, 224, 272, 288, 304]
    assert [(s.name, s.dtype, s.shape) for s in full] == [
        ("v.values", "float16", (1, 65)),
        ("u.values", "float16", (1, 130)),
        ("s", "float32", (1, 1)),
    ]


def test_the_papers_plan_is_one_sixteenth():
    plan = (Band(8, 2), Band(3, 32), Band(2, 968))
    assert rank(plan) == 1002
    assert format_plan(plan) == "8:2,3:32,2:968"
    assert 2 * 4096 * 4096 / codes_nbytes((4096, 4096), plan) == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize("bits", [-1, 0, 5, 6, 7, 9, 32])
def test_widths_that_do_not_exist(bits):
    with pytest.raises(PlanError, match=f"got {bits}"):
        Band(bits, 1)


@pytest.mark.parametrize("count", [0, -1])
def test_bands_without_directions(count):
    with pytest.raises(PlanError, match=f"got {count}"):
        Band(2, count)
