"""Deltas whose spectra fall as those of fine-tunes do, and inputs that are louder in some directions."""

import torch

from deltacome.methods.method import Terms
from deltacome.numerics.gram import relative_error

OUT, IN = 160, 192


def long_tailed(out_size=OUT, in_size=IN, seed=0, power=1.0):
    """float32 (out, in) with singular values r^-power."""
    generator = torch.Generator().manual_seed(seed)
    r = min(out_size, in_size)
    u, _ = torch.linalg.qr(torch.randn(out_size, r, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(in_size, r, generator=generator))
    return u * torch.arange(1, r + 1).float() ** -power @ v.T


def some_gram(size=IN, seed=5, dead=0):
    """The gram of inputs with a few loud directions; the last `dead` inputs are never active."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, size, generator=generator) * torch.logspace(0.5, -1, size)
    x = x @ torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    x[:, size - dead :] *= 0 if dead else 1
    return x.T @ x


def compressed(method, deltas, plans, gram):
    """The packed terms by name; a plan may be bands alone."""
    terms = {n: p if isinstance(p, Terms) else Terms(p) for n, p in plans.items()}
    return method.compress(deltas, terms, gram)


def error_of(method, delta, plan, gram):
    packed = compressed(method, {"w": delta}, {"w": plan}, gram)["w"]
    return relative_error(delta, packed.dense(), torch.eye(IN) if gram is None else gram)
