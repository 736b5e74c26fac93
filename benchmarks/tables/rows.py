"""The rows that tables share: each method, with the ratio at which it is compared."""

from lab import Size

from deltacome import Adaptive, BitDelta, DeltaCome, LowRank, PrinMix, Residual
from deltacome.methods.method import Method

RATIO = 16.0
Row = tuple[str, Method, float | None]


def baselines(size: Size) -> list[Row]:
    """The rows of the paper's main table, and its successors.

    BitDelta's size follows from its one bit. The residual method stores more on top of that, so its ratio
    is smaller: 12.
    """
    initial: list[Row] = [("BitDelta, initial scales", BitDelta(), None)]
    return [
        ("low rank", LowRank(), RATIO),
        *(initial if size.beside else []),
        ("BitDelta", BitDelta(distill=size.distill), None),
        ("Delta-CoMe", DeltaCome(), RATIO),
        ("residual (D-QRELO)", Residual(), 12.0),
        ("PrinMix", PrinMix(), RATIO),
    ]


def main_rows(size: Size) -> list[Row]:
    """All methods; ours last, also at half the bytes, after rows that show what its last step adds."""
    beside: list[Row] = [
        ("Delta-CoMe, distilled too", DeltaCome(distill=size.fit), RATIO),
        ("PrinMix, distilled too", PrinMix(distill=size.fit), RATIO),
        ("adaptive, not distilled", Adaptive(distill=0), RATIO),
    ]
    return [
        *baselines(size),
        *(beside if size.beside else []),
        ("adaptive", Adaptive(distill=size.fit), RATIO),
        ("adaptive, half the bytes", Adaptive(distill=size.fit), 2 * RATIO),
    ]


def curves(size: Size) -> list[tuple[str, Method]]:
    """The methods that work at every ratio."""
    return [
        ("low rank", LowRank()),
        ("Delta-CoMe", DeltaCome()),
        ("PrinMix", PrinMix()),
        ("Delta-CoMe, distilled too", DeltaCome(distill=size.fit)),
        ("adaptive", Adaptive(distill=size.fit)),
    ]
