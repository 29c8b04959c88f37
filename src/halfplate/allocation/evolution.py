"""A better level for every matrix by an evolutionary search on a measured loss, within one budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Choice = tuple[int, ...]
# measure(choice, stage, generation): the loss on the text of a stage; that of the last stage is the same in all generations.
Measure = Callable[[Choice, int, int], float]

STAGES = 3
SHARE = 4  # of the offspring that are measured in a stage, one of so many goes on to the next
SWAPS = 3  # at most, in one mutation
ATTEMPTS = 20  # at an offspring that was not there before


@dataclass(frozen=True)
class Evolution:
    """generations: how often the parent may be replaced. offspring: mutations of it that are tried in each. seed: of all chance."""

    generations: int
    offspring: int
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """The best choice, and the loss of the parent in the last stage at the start and after each generation; it never rises."""

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
    """Search from `start` for the levels of least loss that cost at most `budget` together.

    costs: of the levels of each matrix, rising. An offspring is the parent with a few matrices raised and others lowered
    for it; all are measured on little text, the best of them on more, and the best of these on all, where it takes the parent's
    place if its loss is lower. Source: EvoPress, Sieberling et al., arXiv 2410.14649, algorithm 1 and section 3; here the
    levels of a matrix are those of its Pareto front, which differ in cost, so that a swap may lower several.
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
    """Up to `count` choices that were not there before, added to `seen`."""
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
    """`parent` with one to three matrices raised by a level or two, others lowered until the budget holds, and what is left spent.

    It costs at most `budget` if the parent does; it is the parent itself where nothing can be raised.
    """
    levels, raised, lowered = list(parent), set[int](), set[int]()
    left = budget * (1 + 1e-9) - sum(options[level] for options, level in zip(costs, levels, strict=True))

    def move(matrix: int, level: int) -> None:
        nonlocal left
        left -= costs[matrix][level] - costs[matrix][levels[matrix]]
        levels[matrix] = level

    # The lesser of two numbers makes small mutations the commonest.
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
        if left < 0:  # even all others at their cheapest do not make room
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
