"""How much each decoder layer keeps: shares by a score, and N of M close to them."""

from collections.abc import Sequence

from halfplate.pattern import Pattern


def kept_ratios(scores: Sequence[float], sizes: Sequence[int], mean: float, spread: float) -> list[float]:
    """Kept share of each layer: linear in its score, over a range of 2 · `spread`, with the mean `mean`.

    Layers with equal scores keep the same. Source: OWL, Yin et al. (ICML 2024), section 3, with λ = `spread`.

    sizes: weights of each layer, for the mean.
    """
    least, most = min(scores), max(scores)
    width = most - least
    lifted = [2 * spread * (score - least) / width if width > 0 else 0.0 for score in scores]
    average = sum(lift * size for lift, size in zip(lifted, sizes, strict=True)) / sum(sizes)
    return [mean + lift - average for lift in lifted]


def kept_of_groups(ratios: Sequence[float], sizes: Sequence[int], pattern: Pattern) -> list[int]:
    """N of M for each layer, close to its ratio; together they keep at most as much as `pattern`, and less than one step less.

    Each ratio is rounded down, and then those with the largest remainders up while the total permits (the largest remainder method;
    of equal ones the first). N is between 1 and M − 1.
    """
    wanted = _within([ratio * pattern.m for ratio in ratios], sizes, pattern)
    kept = [int(value + 1e-9) for value in wanted]
    left = pattern.n * sum(sizes) - sum(n * size for n, size in zip(kept, sizes, strict=True))
    order = sorted(range(len(kept)), key=lambda block: kept[block] - wanted[block])
    for block in order:
        if kept[block] < pattern.m - 1 and sizes[block] <= left:
            kept[block] += 1
            left -= sizes[block]
    return kept


def _within(wanted: Sequence[float], sizes: Sequence[int], pattern: Pattern) -> list[float]:
    """`wanted`, all shifted by the amount for which their mean is N after clamping to 1 to M − 1."""

    def clamped(shift: float) -> list[float]:
        return [min(max(value + shift, 1.0), pattern.m - 1.0) for value in wanted]

    low, high = -2.0 * pattern.m, 2.0 * pattern.m
    for _ in range(80):
        middle = (low + high) / 2
        total = sum(value * size for value, size in zip(clamped(middle), sizes, strict=True))
        low, high = (middle, high) if total < pattern.n * sum(sizes) else (low, middle)
    return clamped(high)
