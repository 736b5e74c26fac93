"""Which decomposition gives the leading singular triples of a delta, and what each costs.

The delta is made the way a real one arises: a base of bfloat16 weights, a change whose singular
values fall as a power law, and the sum rounded to bfloat16, which adds noise of full rank about as
large as the change itself. The rank is what 2-bit directions at 1/16 of the bytes allow.

The truncation error of each method is compared with LAPACK's first; the seconds of a method count
only if it is within 1e-4. Prints both.

    python benchmarks/svd.py                     # a table of the shapes below
    python benchmarks/svd.py --shape 11008x4096  # one shape
    python benchmarks/svd.py --no-lapack         # error against the default method instead
    python benchmarks/svd.py --threads 1 --cpu   # CPU seconds, for a machine that is not idle
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deltacome.numerics.svd import svd

SHAPES = ("576x576", "192x576", "1536x576", "4096x4096", "49152x576")
TOLERANCE = 1e-4

Triple = tuple[Tensor, Tensor, Tensor]
Method = Callable[[Tensor, int], Triple]
Clock = Callable[[], float]


def realistic_delta(out: int, inputs: int, seed: int = 0) -> Tensor:
    """float32 (out, inputs): bfloat16 weights after a fine-tune, minus before."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(out, inputs, generator=generator)).bfloat16().float()
    k = min(out, inputs)
    left = torch.randn(out, k, generator=generator) * torch.arange(1, k + 1) ** -0.8
    change = left @ torch.randn(k, inputs, generator=generator)
    change *= 5e-5 / change.std()
    return (base + change).bfloat16().float() - base


def nominal_rank(out: int, inputs: int) -> int:
    """2-bit directions that fit in 1/16 of the bytes of a 16-bit matrix, counting codes alone."""
    return out * inputs // (2 * (out + inputs))


def lapack(a: Tensor, rank: int) -> Triple:
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    return u.T[:rank], s[:rank], v[:rank]


def randomised(passes: int, oversampling: int = 64) -> Method:
    """Subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), float32."""

    def method(a: Tensor, rank: int) -> Triple:
        width = min(rank + oversampling, *a.shape)
        q = torch.linalg.qr(a @ torch.randn(a.shape[1], width))[0]
        for _ in range(passes):
            q = torch.linalg.qr(a.T @ q)[0]
            q = torch.linalg.qr(a @ q)[0]
        u, s, v = torch.linalg.svd(q.T @ a, full_matrices=False)
        return (q @ u).T[:rank], s[:rank], v[:rank]

    return method


METHODS: dict[str, Method] = {
    "torch.linalg.svd": lapack,
    "deltacome svd": svd,
    "randomised, 2 passes": randomised(2),
    "randomised, 8 passes": randomised(8),
}


def truncation_error(a: Tensor, triple: Triple) -> float:
    """‖A − U diag(s) Vᵀ‖² / ‖A‖², without relying on the triple being orthonormal."""
    u, s, v = triple
    rest = a - (u.T * s) @ v
    return float(rest.double().square().sum() / a.double().square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", action="append", help="OUTxIN; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-lapack", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds instead of wall seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu else time.perf_counter
    print(f"{'CPU' if args.cpu else 'wall'} seconds, {args.threads} threads")
    methods = dict(METHODS)
    if args.no_lapack:
        del methods["torch.linalg.svd"]
    for shape in args.shape or SHAPES:
        out, inputs = map(int, shape.split("x"))
        compare(realistic_delta(out, inputs), nominal_rank(out, inputs), methods, clock)


def compare(a: Tensor, rank: int, methods: dict[str, Method], clock: Clock) -> None:
    print(f"\n{a.shape[0]} × {a.shape[1]}, rank {rank}")
    print(f"{'method':24}{'error':>12}{'excess':>12}{'seconds':>10}")
    exact = None
    for name, method in methods.items():
        start = clock()
        triple = method(a, rank)
        seconds = clock() - start
        error = truncation_error(a, triple)
        exact = error if exact is None else exact
        excess = error / exact - 1
        late = "" if excess <= TOLERANCE else "  above the tolerance"
        print(f"{name:24}{error:12.6f}{excess:12.1e}{seconds:10.2f}{late}", flush=True)


if __name__ == "__main__":
    main()
