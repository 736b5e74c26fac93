"""What a GPTQ sweep costs, where the time goes, and what it is worth over plain rounding.

Before anything is timed, `quantize_v` must take the codes of a plain loop over columns (no blocks,
no activation order, the updates of the GPTQ paper in float64), and at every shape the error must
be below that of rounding. The plain loop's time is the yardstick of the first table.

Inputs are synthetic: a decaying spectrum, noise, and four channels fifty times as loud as the rest.

    python benchmarks/gptq.py                     # every shape
    python benchmarks/gptq.py --shape 576x576x144 # one: inputs × outputs × directions
    python benchmarks/gptq.py --threads 1 --cpu   # CPU seconds, for a machine that is not idle
"""

import argparse
import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltacome.format.codec import dequantize
from deltacome.numerics.gptq import Quantized, factor_gram, quantize_u, quantize_v
from deltacome.numerics.grid import min_max_grid, round_to_grid

SHAPES = ("576x576x144", "1536x576x209", "576x1536x209", "4096x4096x1000", "11008x4096x1000")
BITS = 2


def loud_gram(n: int, generator: torch.Generator) -> Tensor:
    """Gram of 2n tokens, float32 (n, n), with four loud channels."""
    d = min(n, 1024)
    x = torch.randn(2 * n, d, generator=generator) / torch.arange(1, d + 1)
    x = x @ torch.randn(d, n, generator=generator)
    x += 0.01 * torch.randn(2 * n, n, generator=generator)
    x[:, :: n // 4] *= 50
    return x.T @ x


def plain_loop(w: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, group: int = 128) -> Tensor:
    """Codes of GPTQ column by column; every update goes to all later columns at once."""
    w, n = w.double().clone(), len(gram)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(n).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for j in range(n):
        s, z = scale[:, j // group].double(), zero[:, j // group].double()
        code = (w[:, j] / s + z).round().clamp(0, 2**BITS - 1)
        codes[:, j] = code.to(torch.uint8)
        error = (w[:, j] - (code - z) * s) / upper[j, j]
        w[:, j:] -= torch.outer(error, upper[j, j:])
    return codes


def energy(q: Quantized, w: Tensor, gram: Tensor, columns_are_rows: bool = False) -> float:
    """tr(E C Eᵀ); for U the columns of E are the directions."""
    error = dequantize(*q).sub_(w)
    error = (error.T if columns_are_rows else error).double()
    return float(((error @ gram.double()) * error).sum())


def rounded(w: Tensor) -> Quantized:
    grid = min_max_grid(w, BITS)
    return Quantized(round_to_grid(w, *grid, BITS), *grid)


def check_and_race(clock) -> None:
    """Checks the codes against the plain loop's, and prints how much faster `quantize_v` is."""
    generator = torch.Generator().manual_seed(0)
    n, r = 576, 144
    gram = loud_gram(n, generator)
    v = normalize(torch.randn(r, n, generator=generator))
    start = clock()
    got = quantize_v(v, factor_gram(gram, act_order=False), BITS)
    ours = clock() - start
    start = clock()
    expected = plain_loop(v, gram, got.scale, got.zero)
    plain = clock() - start
    # Ours sweeps in float32: a target that lies halfway between two codes may fall either way.
    differ = float((got.codes != expected).double().mean())
    if differ > 1e-3:
        raise SystemExit(f"{differ:.2%} of the codes are not those of the plain loop")
    print(f"{n} inputs, {r} directions: {differ:.3%} of codes differ from the plain loop's")
    print(f"plain loop, float64 {plain:.3f} s; quantize_v {ours:.3f} s; {plain / ours:.1f}×\n")


def measure(inputs: int, out: int, r: int, clock) -> str:
    generator = torch.Generator().manual_seed(0)
    gram = loud_gram(inputs, generator)
    v = normalize(torch.randn(r, inputs, generator=generator))
    u = normalize(torch.randn(r, out, generator=generator))
    start = clock()
    factor = factor_gram(gram)
    factored = clock()
    v_hat = quantize_v(v, factor, BITS)
    swept = clock()
    a = dequantize(*v_hat) / torch.arange(1, r + 1).sqrt()[:, None]
    u_gram = a @ gram @ a.T
    formed = clock()
    u_hat = quantize_u(u, factor_gram(u_gram), BITS)
    done = clock()
    gain_v = energy(v_hat, v, gram) / energy(rounded(v), v, gram)
    gain_u = energy(u_hat, u, u_gram, True) / energy(rounded(u), u, u_gram, True)
    if max(gain_v, gain_u) >= 1:
        raise SystemExit(f"no better than rounding: {gain_v:.3f} for V, {gain_u:.3f} for U")
    return (
        f"{inputs:7}{out:7}{r:6}{factored - start:10.2f}{swept - factored:9.2f}"
        f"{formed - swept:9.2f}{done - formed:9.2f}{gain_v:9.3f}{gain_u:9.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", action="append", help="INxOUTxDIRECTIONS; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds instead of wall seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu else time.perf_counter
    kind = "CPU" if args.cpu else "wall"
    print(f"{kind} seconds, {args.threads} threads, {BITS} bits\n")
    check_and_race(clock)
    print("                        V                    U           error / rounding's")
    print("     in    out     r    factor    sweep     gram    sweep        V        U")
    for shape in args.shape or SHAPES:
        inputs, out, r = map(int, shape.split("x"))
        print(measure(inputs, out, r, clock), flush=True)


if __name__ == "__main__":
    main()
