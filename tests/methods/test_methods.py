"""Every method: what it promises about bytes and errors, on the same deltas."""

import json
from types import SimpleNamespace

import pytest
import torch
from methods_helpers import IN, OUT, compressed, error_of, long_tailed, some_gram

from deltacome.errors import PlanError
from deltacome.format.codec import Packed, plan_of, read_bands, read_signs
from deltacome.format.spec import Band, rank
from deltacome.methods.adaptive import Adaptive
from deltacome.methods.bitdelta import BitDelta
from deltacome.methods.delta_come import DeltaCome
from deltacome.methods.low_rank import LowRank
from deltacome.methods.method import Matrix, Terms
from deltacome.methods.prinmix import WIDTHS, PrinMix, best_plan, direction_costs
from deltacome.methods.residual import Residual
from deltacome.methods.template import parse_template
from deltacome.numerics.gptq import factor_gram, quantize_v
from deltacome.numerics.gram import relative_error

SHAPES = {"a": (OUT, IN), "b": (OUT, IN), "c": (320, IN), "d": (64, IN)}
ADAPTIVE = [DeltaCome(), LowRank(), Residual(), PrinMix(), Adaptive(distill=0)]
ALL = [*ADAPTIVE, BitDelta(), BitDelta("rows"), Residual(parse_template("4:2,2:*"), "rows")]


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        (BitDelta, "rate", 0),
        (BitDelta, "rate", float("nan")),
        (BitDelta, "loss", "hope"),
        (BitDelta, "scales", "row"),
        (Residual, "scales", "column"),
        (LowRank, "directions", 0),
        *((kind, "distill", -1) for kind in (BitDelta, DeltaCome, PrinMix, Adaptive)),
        *((kind, "damping", -0.1) for kind in (DeltaCome, PrinMix, Adaptive)),
        (Adaptive, "damping", float("inf")),
    ],
)
def test_options_out_of_range_are_refused(kind, option, value):
    with pytest.raises(PlanError, match=f"{option}: expected .*, got {value!r}"):
        kind(**{option: value})


def matrices_of(shapes=SHAPES):
    deltas = {name: long_tailed(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return deltas, {n: Matrix(shapes[n], lambda n=n: deltas[n]) for n in shapes}


def total(plans):
    return sum(plan.nbytes(SHAPES[name]) for name, plan in plans.items())


def name_of(method):
    return "-".join(str(value) for value in method.options().values())


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_what_is_stored_is_what_was_planned_and_reads_back(method):
    deltas, matrices = matrices_of()
    plans = method.planner(matrices)(2 * sum(o * i for o, i in SHAPES.values()) / 8)
    assert list(plans) == list(SHAPES)
    for name, packed in method.compress(deltas, plans, some_gram()).items():
        assert plan_of(packed.bands) == plans[name].bands
        scales = packed.signs.scale.numel() if packed.signs else None
        assert scales == plans[name].sign_scales
        blobs, shape = packed.blobs(), SHAPES[name]
        assert sum(map(len, blobs.values())) == plans[name].nbytes(shape)
        again = Packed(
            read_bands(blobs["bands"], shape, plans[name].bands) if packed.bands else (),
            read_signs(blobs["signs"], shape, scales) if packed.signs else None,
        )
        assert torch.equal(again.dense(), packed.dense())
        assert relative_error(deltas[name], packed.dense(), None) < 0.7


@pytest.mark.parametrize("method", ADAPTIVE, ids=name_of)
@pytest.mark.parametrize("ratio", [5, 9, 14])
def test_plans_fill_the_bytes_and_no_more(method, ratio):
    _, matrices = matrices_of()
    nbytes = 2 * sum(o * i for o, i in SHAPES.values()) / ratio
    planner = method.planner(matrices)
    plans = planner(nbytes)
    assert 0.97 * nbytes <= total(plans) <= nbytes * 1.005
    assert planner(nbytes) == plans
    assert total(planner(0)) < total(plans)


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_options_are_json(method):
    said = method.options()
    assert json.loads(json.dumps(said)) == said
    assert said["name"] in ("delta-come", "low-rank", "bitdelta", "residual", "prinmix", "adaptive")


def test_the_ratio_where_none_is_asked_for():
    for method in ADAPTIVE:
        assert method.default_ratio == (12 if isinstance(method, Residual) else 16)
    assert BitDelta().default_ratio is None
    assert LowRank(9).default_ratio is None
    assert DeltaCome(parse_template("8:1,2:4")).default_ratio is None


def test_low_rank_is_the_truncated_svd():
    delta = long_tailed()
    u, s, v = torch.linalg.svd(delta)
    best = u[:, :9] * s[:9] @ v[:9]
    (packed,) = compressed(LowRank(9), {"w": delta}, {"w": (Band(16, 9),)}, None).values()
    torch.testing.assert_close(packed.dense(), best, atol=1e-3, rtol=1e-3)
    terms = LowRank(9).planner({"w": Matrix((OUT, IN), lambda: delta)})(0)["w"]
    assert terms == Terms((Band(16, 9),))


@pytest.mark.parametrize("scales", ["matrix", "rows"])
def test_bitdelta_has_the_best_scale_for_its_signs(scales):
    delta = long_tailed()
    delta[3, 5] = 0.0
    packed = BitDelta(scales).compress({"w": delta}, {}, None)["w"]
    assert torch.equal(packed.dense() > 0, delta > 0)
    assert (packed.signs.dense()[3, 5] < 0).all()
    least = (packed.dense() - delta).square().sum()
    for factor in (0.98, 1.02):
        assert (packed.dense() * factor - delta).square().sum() > least
    if scales == "matrix":
        torch.testing.assert_close(packed.signs.scale[0], delta.abs().mean())


def test_scales_of_rows_are_closer_than_one():
    delta = long_tailed() * torch.logspace(0, -1, OUT)[:, None]
    one, rows = Terms(sign_scales=1), Terms(sign_scales=OUT)
    assert error_of(BitDelta("rows"), delta, rows, None) < error_of(BitDelta(), delta, one, None)


def test_a_residual_is_closer_than_its_signs_alone():
    delta, gram = long_tailed(), some_gram()
    errors = [
        error_of(Residual(), delta, Terms(bands, 1), gram)
        for bands in ((), (Band(16, 2),), (Band(16, 12),))
    ]
    assert errors[0] == error_of(BitDelta(), delta, Terms(sign_scales=1), gram)
    assert errors[0] > errors[1] > errors[2] > 0


def test_signs_suit_a_flat_spectrum_and_low_rank_a_steep_one():
    # Why D-QRELO uses both: at equal bytes, each suits one kind of delta, of high rank or of low.
    def errors(power):
        delta, nbytes = long_tailed(power=power), 2 * OUT * IN / 15
        plans = LowRank().planner({"w": Matrix((OUT, IN), lambda: delta)})(nbytes)
        signs = error_of(BitDelta(), delta, Terms(sign_scales=1), None)
        return signs, error_of(LowRank(), delta, plans["w"], None)

    flat, steep = errors(0.2), errors(1.5)
    assert flat[0] < flat[1]
    assert steep[0] > steep[1]


def test_the_program_is_optimal():
    # Compared with all plans that spend a little less, for a delta of few directions.
    shape = (16, 1024)
    costs, nbytes = direction_costs(long_tailed(*shape)), 3600
    index = {bits: 1 + i for i, bits in enumerate(WIDTHS)}

    def cost(plan):
        bits = [band.bits for band in plan for _ in range(band.count)]
        kept = sum(costs[i, index[b]] for i, b in enumerate(bits))
        return kept + costs[len(bits) :, 0].sum()

    found = best_plan(shape, costs, nbytes)
    assert 0.9 * nbytes < Terms(found).nbytes(shape) <= nbytes
    counts = range(7)
    for plan in (
        tuple(Band(b, n) for b, n in zip(WIDTHS, (i, j, k, m), strict=True) if n)
        for i in counts for j in counts for k in counts for m in counts
    ):  # fmt: skip
        if plan and rank(plan) <= 16 and Terms(plan).nbytes(shape) <= 0.95 * nbytes:
            assert cost(plan) >= cost(found) * 0.999


def test_what_one_matrix_cannot_spend_goes_to_those_after_it():
    """Of so small matrices a direction is a large part of the bytes."""
    shape, delta = (32, 128), long_tailed(32, 128)
    nbytes = 12 * 220
    plans = PrinMix().planner({i: Matrix(shape, lambda: delta) for i in range(12)})(nbytes)
    assert 0.95 * nbytes < sum(plan.nbytes(shape) for plan in plans.values()) <= nbytes


def test_prinmix_names_the_matrix_that_it_cannot_plan(monkeypatch):
    gives_up = SimpleNamespace(x=None, message="time is up")
    monkeypatch.setattr("deltacome.methods.prinmix.milp", lambda *_, **__: gives_up)
    matrix = Matrix((OUT, IN), long_tailed)
    with pytest.raises(PlanError, match=r"^a\.weight: integer program .*: time is up"):
        PrinMix().planner({"a.weight": matrix})(1000)


def test_prinmix_is_closer_than_delta_come_at_equal_bytes():
    gram, nbytes = some_gram(), 2 * OUT * IN / 12
    for seed in range(3):
        delta = long_tailed(seed=seed)
        matrices = {"w": Matrix((OUT, IN), lambda delta=delta: delta)}
        errors = [
            error_of(method, delta, method.planner(matrices)(nbytes)["w"], gram)
            for method in (PrinMix(), PrinMix(refit=False), DeltaCome())
        ]
        assert errors == sorted(errors)


@pytest.mark.parametrize("method", [PrinMix(), Adaptive(distill=0)])
@pytest.mark.parametrize("ratio", [3, 6, 12])
def test_little_text_does_not_ruin_what_it_does_not_show(method, ratio):
    delta, draw = long_tailed(), torch.Generator().manual_seed(0)
    x = torch.randn(5, IN, generator=draw)
    plan = method.planner({"w": Matrix((OUT, IN), lambda: delta)})(2 * OUT * IN / ratio)["w"]
    packed = compressed(method, {"w": delta}, {"w": plan}, x.T @ x)["w"].dense()
    whole = compressed(method, {"w": delta}, {"w": plan}, None)["w"].dense()
    everywhere = torch.eye(IN)
    assert relative_error(delta, packed, x.T @ x) < relative_error(delta, whole, x.T @ x)
    assert relative_error(delta, packed, everywhere) < 3 * relative_error(delta, whole, everywhere)


def test_prinmix_of_a_delta_with_few_directions():
    """Of a merged LoRA say: the others have singular values next to 0, which left factors make up for."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.randn(size, 4, generator=draw) for size in (OUT, IN))
    delta = u @ v.T / 100
    matrix = Matrix((OUT, IN), lambda: delta)
    plan = PrinMix().planner({"w": matrix})(2 * OUT * IN / 4)["w"]
    assert rank(plan.bands) > 4
    assert error_of(PrinMix(), delta, plan, some_gram()) < 1e-3


def test_directions_are_shared_out_on_the_cpu(monkeypatch):
    """That is where prices are. The stand-in for a spectrum on a GPU can only be copied to the CPU."""
    there = SimpleNamespace(cpu=lambda: torch.arange(IN, 0, -1).float())
    monkeypatch.setattr(Adaptive, "spectrum", lambda *_: there)
    plans = Adaptive().planner({"w": Matrix((IN, IN), lambda: torch.empty(0))})(IN * IN / 8)
    assert plans["w"].bands


def test_a_higher_penalty_on_leaving_out_leaves_out_less(monkeypatch):
    matrix, ranks = Matrix((OUT, IN), long_tailed), []
    for cut in (1.0, 3.0, 9.0):
        monkeypatch.setattr("deltacome.methods.adaptive.CUT", cut)
        ranks.append(rank(Adaptive().planner({"w": matrix})(OUT * IN / 8)["w"].bands))
    assert ranks[0] < ranks[1] < ranks[2]


def test_codes_are_found_with_the_damping_that_is_asked_for():
    gram, v = some_gram(), torch.randn(5, IN, generator=torch.Generator().manual_seed(1))
    codes = [Adaptive(damping=0.5)._quantize(v, torch.tensor(2), gram).codes]
    codes += [quantize_v(v, factor_gram(gram, damping), 2).codes for damping in (0.5, 0.01)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_plans_go_by_part_of_what_was_measured_of_a_matrix(alike, monkeypatch):
    spectrum = torch.arange(1, IN + 1).float() ** -2

    def plans(loud):
        weights = {"loud": loud * spectrum, "quiet": spectrum}
        matrices = {n: Matrix((IN, IN), lambda: spectrum, w) for n, w in weights.items()}
        return Adaptive().planner(matrices)(IN * IN / 8)

    monkeypatch.setattr("deltacome.methods.adaptive.ALIKE", alike)
    found = plans(1e4)
    assert (found["loud"] != found["quiet"]) == (alike < 1)
    monkeypatch.setattr("deltacome.methods.adaptive.ALIKE", 0.0)
    assert found == plans(1e4 ** (1 - alike))
