"""How much each decoder layer keeps: shares by a score, and N of M or other steps close to them."""

from collections.abc import Sequence

from halfplate.pattern import Pattern


def kept_ratios(scores: Sequence[float], sizes: Sequence[int], mean: float, spread: float) -> list[float]:
    """Kept share of each layer: linear in its score, over a range of 2 · `spread`, with the mean `mean`.

    Layers with equal scores keep the same. Source: OWL, Yin et al. (ICML 2024), section 3, with λ = `spread`.

    sizes: weights of each layer, for the mean.
    """
    least, most = min(scores), max(scores)
    width = most - least
    lifted = [2 * spread * ((score - least) / width) if width > 0 else 0.0 for score in scores]
    average = sum(lift * size for lift, size in zip(lifted, sizes, strict=True)) / sum(sizes)
    return [mean + lift - average for lift in lifted]


def kept_of_groups(ratios: Sequence[float], sizes: Sequence[int], pattern: Pattern) -> list[int]:
    """N of M for each layer, close to its ratio; together they keep at most as much as `pattern`, and less than one step less.

    N is between 1 and M − 1.
    """
    steps = range(1, pattern.m)
    chosen = nearest_steps([ratio * pattern.m for ratio in ratios], sizes, steps, pattern.n)
    return [steps[number] for number in chosen]


def nearest_steps(wanted: Sequence[float], sizes: Sequence[int], steps: Sequence[float], mean: float) -> list[int]:
    """The number of a step for each layer, close to the value that it wants; their mean is at most `mean`.

    Each value is rounded down, and then those with the largest remainders up while the total permits (the largest remainder method;
    of equal ones the first).

    steps: ascending.
    """
    wanted = _within(wanted, sizes, steps, mean)
    chosen = [max(number for number, step in enumerate(steps) if step <= value + 1e-9) for value in wanted]
    left = mean * sum(sizes) - sum(steps[number] * size for number, size in zip(chosen, sizes, strict=True))
    for block in sorted(range(len(chosen)), key=lambda block: steps[chosen[block]] - wanted[block]):
        above = chosen[block] + 1
        if above < len(steps) and (cost := (steps[above] - steps[chosen[block]]) * sizes[block]) <= left + 1e-9:
            chosen[block] = above
            left -= cost
    return chosen


def _within(wanted: Sequence[float], sizes: Sequence[int], steps: Sequence[float], mean: float) -> list[float]:
    """`wanted`, all shifted by the amount for which their mean is `mean` after clamping to the first and the last step."""

    def clamped(shift: float) -> list[float]:
        return [min(max(value + shift, steps[0]), steps[-1]) for value in wanted]

    far = steps[-1] + max(map(abs, wanted))
    low, high = -far, far
    for _ in range(80):
        middle = (low + high) / 2
        total = sum(value * size for value, size in zip(clamped(middle), sizes, strict=True))
        low, high = (middle, high) if total < mean * sum(sizes) else (low, middle)
    return clamped(high)
