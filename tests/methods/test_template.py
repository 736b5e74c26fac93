"""Plans with a hole: what is parsed, and that a filled plan is the largest that fits."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltacome.errors import PlanError
from deltacome.format.spec import Band, bands_nbytes, rank
from deltacome.methods.template import PRECISIONS, Template, parse_template


def bands(*pairs):
    return tuple(Band(bits, count) for bits, count in pairs)


@pytest.mark.parametrize("text", ["8:2,3:1/128,2:*", "2:*", "16:4", "8:2,8:3,1:*", "4:1/2,2:7"])
def test_a_template_prints_as_it_is_parsed(text):
    assert str(parse_template(text)) == text
    assert parse_template(str(parse_template(text))) == parse_template(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "bits:count"),
        ("8", "bits:count"),
        ("8:2;2:*", "bits:count"),
        ("8:-1", "bits:count"),
        ("8:2,", "bits:count"),
        ("5:2", "bits:count"),
        ("8:0", "above 0"),
        ("8:0/4", "above 0"),
        ("8:1/0", "above 0"),
        ("8:*,2:*", "last band"),
        ("8:*,2:4", "last band"),
        ("2:4,8:*", "fall"),
    ],
)
def test_what_is_not_a_template_is_refused(text, reason):
    with pytest.raises(PlanError, match=reason):
        parse_template(text)


def test_a_fraction_is_of_the_smaller_side_and_at_least_one():
    template = parse_template("8:2,3:1/128,2:5")
    assert template.fill((4096, 11008), 0) == bands((8, 2), (3, 32), (2, 5))
    assert template.fill((100, 50), 0) == bands((8, 2), (3, 1), (2, 5))


def test_the_paper_s_plan_at_a_sixteenth():
    # Delta-CoMe, table 2: 8+3+2 at 1/16 of 16 bit for 4096-wide attention is 2, 32, 968 directions;
    # the paper counts only codes, so this is the same number of bytes without scales and padding.
    template, shape = parse_template(PRECISIONS["triple"]), (4096, 4096)
    paper = bands((8, 2), (3, 32), (2, 968))
    assert template.fill(shape, bands_nbytes(shape, paper)) == paper
    assert template.fill(shape, bands_nbytes(shape, paper) - 1) == bands((8, 2), (3, 32), (2, 967))


def test_fixed_plans_are_clipped_at_the_rank():
    assert parse_template("8:2,2:100").fill((10, 7), 0) == bands((8, 2), (2, 5))
    assert parse_template("8:20,2:5").fill((10, 7), 0) == bands((8, 7))


counts = st.one_of(
    st.integers(1, 40).map(str),
    st.tuples(st.integers(1, 3), st.integers(1, 64)).map("{0[0]}/{0[1]}".format),
)


@st.composite
def templates(draw):
    widths = sorted(draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1, max_size=4)))
    parts = [f"{bits}:{draw(counts)}" for bits in reversed(widths)]
    hole = draw(st.booleans())
    return parse_template(",".join([*parts[:-1], f"{widths[0]}:*"] if hole else parts))


shapes = st.tuples(st.integers(1, 90), st.integers(1, 300))


def longest(template: Template, shape):
    """The plan without a limit of bytes; every other plan is a prefix of it."""
    return template.fill(shape, float("inf"))


def directions(plan):
    return [band.bits for band in plan for _ in range(band.count)]


@settings(max_examples=300, deadline=None)
@given(templates(), shapes, st.floats(-10, 40000))
@example(parse_template("8:20,2:*"), (16, 16), 1100.0)  # the fixed counts alone exceed the rank
def test_a_filled_plan_fits_and_is_the_largest_that_does(template, shape, nbytes):
    plan, full = template.fill(shape, nbytes), longest(template, shape)
    assert rank(plan) <= min(shape)
    assert directions(plan) == directions(full)[: rank(plan)]
    if not template.has_hole:
        assert plan == full
        return
    assert bands_nbytes(shape, plan) <= max(nbytes, 0)
    if plan != full:
        grown = template.grow(shape, plan)
        assert grown is not None
        assert bands_nbytes(shape, grown) > nbytes


@settings(max_examples=200, deadline=None)
@given(templates(), shapes, st.floats(0, 40000))
def test_a_grown_plan_has_one_more_direction_of_the_template(template, shape, nbytes):
    plan, full = template.fill(shape, nbytes), longest(template, shape)
    grown = template.grow(shape, plan)
    if not template.has_hole or plan == full:
        assert grown is None
    else:
        assert grown is not None
        assert directions(grown) == directions(full)[: rank(plan) + 1]


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions_have_a_hole(name):
    assert parse_template(PRECISIONS[name]).has_hole
