"""The method by itself, on deltas whose spectra fall as those of fine-tunes do."""

import pytest
import torch
from methods_helpers import IN, OUT, compressed, error_of, long_tailed, some_gram

from deltacome.errors import CalibrationError
from deltacome.format.codec import dense, dequantize, plan_of
from deltacome.format.spec import Band, bands_nbytes, rank
from deltacome.methods.delta_come import DeltaCome
from deltacome.methods.template import PRECISIONS, parse_template
from deltacome.numerics.gptq import factor_gram, quantize_u, quantize_v
from deltacome.numerics.gram import relative_error
from deltacome.numerics.svd import svd


def bands_of(delta, plan, gram):
    bands = compressed(DeltaCome(), {"w": delta}, {"w": plan}, gram)["w"].bands
    assert plan_of(bands) == plan
    return bands


def test_gptq_beats_rounding_on_the_calibration_inputs():
    plan, gram = parse_template("8:2,3:8,2:60").fill((OUT, IN), 0), some_gram()
    for seed in range(3):
        delta = long_tailed(seed=seed)
        swept = error_of(DeltaCome(), delta, plan, gram)
        rounded = error_of(DeltaCome(gptq=False), delta, plan, gram)
        assert swept < 0.8 * rounded


@pytest.mark.parametrize("calibrated", [True, False])
def test_more_precisions_are_better_at_equal_bytes(calibrated):
    # The paper's table 2 and its claim: singular vectors of large singular values deserve more bits.
    gram = some_gram() if calibrated else None
    nbytes = 2 * OUT * IN / 12
    errors = {}
    for name, text in PRECISIONS.items():
        plan = parse_template(text.replace("1/128", "1/16")).fill((OUT, IN), nbytes)
        assert nbytes * 0.97 < bands_nbytes((OUT, IN), plan) <= nbytes
        errors[name] = error_of(DeltaCome(), long_tailed(power=1.5), plan, gram)
    assert errors["single"] > errors["double"] > errors["triple"]


@pytest.mark.parametrize("bits", [16, 8])
def test_wide_bands_of_full_rank_give_the_delta_back(bits):
    delta = long_tailed()
    error = error_of(DeltaCome(), delta, (Band(bits, OUT),), some_gram())
    assert error < {16: 1e-6, 8: 1e-3}[bits]


def test_v_is_swept_against_the_inputs_and_u_against_what_v_lets_through():
    # Section 3.3: V̂ = GPTQ(Vᵀ; C), then Û = GPTQ(U; (S V̂ᵀ) C (S V̂ᵀ)ᵀ), band by band.
    delta, gram, plan = long_tailed(), some_gram(), (Band(8, 2), Band(3, 6), Band(2, 20))
    bands = bands_of(delta, plan, gram)
    u_RO, s_R, v_RI = svd(delta, rank(plan))
    start = 0
    for band, made in zip(plan, bands, strict=True):
        part = slice(start, start + band.count)
        v = quantize_v(v_RI[part] * IN**0.5, factor_gram(gram), band.bits)
        assert torch.equal(dequantize(*v), made.v.dequantize())
        torch.testing.assert_close(made.s, s_R[part] / (OUT * IN) ** 0.5)
        a_BI = made.s[:, None] * made.v.dequantize()
        factor = factor_gram(a_BI @ gram @ a_BI.T)
        u = quantize_u(u_RO[part] * OUT**0.5, factor, band.bits)
        assert torch.equal(dequantize(*u), made.u.dequantize())
        start += band.count


def test_linears_of_one_group_do_not_depend_on_each_other():
    gram = some_gram()
    deltas = {"q": long_tailed(seed=1), "k": long_tailed(40, seed=2), "v": long_tailed(40, seed=3)}
    plans = {
        "q": (Band(16, 1), Band(8, 2), Band(2, 20)),
        "k": (Band(8, 1), Band(3, 3)),
        "v": (Band(16, 2),),
    }
    together = compressed(DeltaCome(), deltas, plans, gram)
    assert list(together) == ["q", "k", "v"]
    for name, delta in deltas.items():
        alone = bands_of(delta, plans[name], gram)
        assert plan_of(together[name].bands) == plans[name]
        torch.testing.assert_close(together[name].dense(), dense(alone))


def test_neither_gram_nor_deltas_are_changed():
    delta, gram = long_tailed(), some_gram()
    copies = delta.clone(), gram.clone()
    bands_of(delta, (Band(8, 1), Band(2, 9)), gram)
    assert torch.equal(delta, copies[0])
    assert torch.equal(gram, copies[1])


def test_dead_inputs():
    gram = some_gram(dead=30)
    error = error_of(DeltaCome(), long_tailed(), (Band(8, 4), Band(2, 60)), gram)
    assert 0 < error < 0.2


def test_a_direction_that_inputs_reach_by_rounding_alone():
    """What it lets through then comes out below 0 about as often as above."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x, delta = (torch.randn(n, 40, generator=generator) for n in (1, 24))
        delta -= delta @ torch.linalg.pinv(x) @ x
        plans, gram = {"w": (Band(8, 1),)}, 1e6 * x.T @ x
        packed = compressed(DeltaCome(), {"w": delta}, plans, gram)["w"]
        u, s, v = torch.linalg.svd(delta)
        torch.testing.assert_close(packed.dense(), s[0] * u[:, :1] @ v[:1], atol=0.03, rtol=0)


def test_a_delta_of_zero_stays_zero():
    bands = bands_of(torch.zeros(OUT, IN), (Band(8, 1), Band(2, 3)), None)
    assert not dense(bands).any()


def test_more_directions_than_the_delta_has():
    delta = torch.outer(torch.linspace(-1, 1, OUT), torch.linspace(0, 1, IN))
    plan = (Band(8, 2), Band(2, 20))
    assert error_of(DeltaCome(), delta, plan, some_gram()) < 1e-3


def test_tiny_deltas_do_not_underflow():
    # float16 scales of unit vectors this long would be subnormal, were factors not rescaled.
    delta = 1e-6 * long_tailed(4000, 40, power=0.5)
    bands = bands_of(delta, (Band(8, 40),), None)
    assert relative_error(delta, dense(bands), torch.eye(40)) < 1e-3


def test_a_gram_that_cannot_be_factored_is_refused():
    gram = some_gram()
    gram[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        bands_of(long_tailed(), (Band(2, 3),), gram)


def test_equal_inputs_give_equal_bytes():
    plan = (Band(8, 2), Band(3, 4), Band(2, 30))
    assert rank(plan) == 36
    first, second = (bands_of(long_tailed(), plan, some_gram()) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.s, two.s)
        for a, b in ((one.u, two.u), (one.v, two.v)):
            assert all(torch.equal(p, q) for p, q in zip(a.planes, b.planes, strict=True))
