"""An evolutionary search for a better candidate of every matrix, by a measured loss and within one budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Choice = tuple[int, ...]
# measure(choice, stage, generation): the loss on the text of a stage. The last stage has the same text in all generations.
Measure = Callable[[Choice, int, int], float]

STAGES = 3
SHARE = 4  # one of this many offspring of a stage advances to the next stage
SWAPS = 3  # most matrices that one mutation raises
ATTEMPTS = 20  # attempts to find an offspring that has not been tried


@dataclass(frozen=True)
class Evolution:
    """generations: number of generations, each of which may replace the parent.
    offspring: mutations that are tried per generation.
    seed: of all random numbers.
    """

    generations: int
    offspring: int
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """The best choice, and the parent's loss in the last stage at the start and after each generation; it never rises."""

    choice: Choice
    losses: tuple[float, ...]


def evolve(
    costs: Sequence[Sequence[float]],
    start: Sequence[int],
    budget: float,
    measure: Measure,
    settings: Evolution,
    report: Callable[[int, float], None] = lambda generation, loss: None,
) -> Found:
    """Search from `start` for the candidates with the least loss whose total cost is at most `budget`.

    An offspring is the parent with a few matrices raised and others lowered in exchange. All are measured on little text, the best of
    them on more, and the best of these on all, where it replaces the parent if its loss is lower. Source: EvoPress, Sieberling et
    al., arXiv 2410.14649, algorithm 1 and section 3. Here the candidates of a matrix are those of its Pareto front, which differ in
    cost, so an exchange may lower several matrices.

    costs: of the candidates of each matrix, increasing.
    """
    random = Random(settings.seed)
    parent: Choice = tuple(start)
    loss = measure(parent, STAGES - 1, 0)
    losses = [loss]
    seen = {parent}
    report(0, loss)
    for generation in range(1, settings.generations + 1):
        offspring = _offspring(parent, costs, budget, settings.offspring, seen, random)
        for stage in range(STAGES - 1):
            ranked = sorted((measure(child, stage, generation), child) for child in offspring)
            offspring = [child for _, child in ranked[: max(1, len(ranked) // SHARE)]]
        for child in offspring:
            if (found := measure(child, STAGES - 1, generation)) < loss:
                parent, loss = child, found
        losses.append(loss)
        report(generation, loss)
    return Found(parent, tuple(losses))


def _offspring(
    parent: Choice, costs: Sequence[Sequence[float]], budget: float, count: int, seen: set[Choice], random: Random
) -> list[Choice]:
    """Up to `count` choices that have not been tried, added to `seen`."""
    found: list[Choice] = []
    for _ in range(count * ATTEMPTS):
        if len(found) == count:
            break
        child = mutated(parent, costs, budget, random)
        if child not in seen:
            seen.add(child)
            found.append(child)
    return found


def mutated(parent: Choice, costs: Sequence[Sequence[float]], budget: float, random: Random) -> Choice:
    """`parent` with one to three matrices raised by one or two candidates, others lowered until the budget holds, and the rest of the budget spent.

    It costs at most `budget` if the parent does. It equals the parent if nothing can be raised.
    """
    levels, raised, lowered = list(parent), set[int](), set[int]()
    left = budget * (1 + 1e-9) - sum(options[level] for options, level in zip(costs, levels, strict=True))

    def move(matrix: int, level: int) -> None:
        nonlocal left
        left -= costs[matrix][level] - costs[matrix][levels[matrix]]
        levels[matrix] = level

    # The smaller of two random numbers makes small mutations most frequent.
    for _ in range(min(random.randint(1, SWAPS), random.randint(1, SWAPS))):
        able = [k for k in range(len(levels)) if k not in lowered | raised and levels[k] + 1 < len(costs[k])]
        if not able:
            break
        matrix = random.choice(able)
        before = list(levels)
        move(matrix, min(levels[matrix] + random.randint(1, 2), len(costs[matrix]) - 1))
        raised.add(matrix)
        while left < 0:
            able = [k for k in range(len(levels)) if k not in raised and levels[k] > 0]
            if not able:
                break
            down = random.choice(able)
            move(down, levels[down] - 1)
            lowered.add(down)
        if left < 0:  # the budget is exceeded even with all others at their cheapest
            for k, level in enumerate(before):
                move(k, level)
            raised.discard(matrix)
            lowered = {k for k in lowered if levels[k] != parent[k]}
            break
    rest = [k for k in range(len(levels)) if k not in lowered]
    random.shuffle(rest)
    for matrix in rest[: SWAPS * len(lowered)]:
        if levels[matrix] + 1 < len(costs[matrix]):
            up = levels[matrix] + 1
            if costs[matrix][up] - costs[matrix][levels[matrix]] <= left:
                move(matrix, up)
    return tuple(levels)
