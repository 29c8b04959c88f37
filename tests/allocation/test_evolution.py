"""The evolutionary search: never over budget, never worse than its start, the same for the same seed."""

from itertools import pairwise, product
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.allocation import Evolution, evolve
from halfplate.allocation.evolution import STAGES, mutated

rising = st.lists(st.integers(1, 1000).map(float), min_size=1, max_size=5, unique=True).map(sorted)


def total(costs, choice):
    return sum(options[level] for options, level in zip(costs, choice, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(rising, min_size=1, max_size=6), st.integers(0, 10**6), st.floats(1, 1.5))
def test_mutations_keep_the_budget(costs, seed, room):
    random = Random(seed)
    parent = tuple(random.randrange(len(options)) for options in costs)
    budget = total(costs, parent) * room
    for _ in range(10):
        child = mutated(parent, costs, budget, random)
        assert total(costs, child) <= budget * (1 + 1e-8)
        assert all(0 <= level < len(options) for level, options in zip(child, costs, strict=True))


def test_mutations_reach_every_choice_within_the_budget():
    costs, budget = [[1.0, 2.0, 4.0]] * 3, 7.0
    random, reached, edge = Random(0), {(0, 0, 0)}, [(0, 0, 0)]
    while edge:
        parent = edge.pop()
        for _ in range(300):
            child = mutated(parent, costs, budget, random)
            if child not in reached:
                reached.add(child)
                edge.append(child)
    tight = {choice for choice in product(range(3), repeat=3) if budget - 1 < total(costs, choice) <= budget}
    assert tight <= reached


class Coupled:
    """A loss that does not add up over matrices: neighbours at different levels harm each other."""

    def __init__(self):
        self.calls = []

    def __call__(self, choice, stage, generation):
        self.calls.append((choice, stage, generation))
        exact = sum((3 - level) ** 2 for level in choice) + 5 * sum(abs(a - b) for a, b in pairwise(choice))
        # Less text knows the loss less well.
        return exact + (STAGES - 1 - stage) * (hash((choice, generation)) % 100) / 100


def test_it_beats_a_start_that_took_losses_for_additive():
    costs = [[1.0, 2.0, 3.0, 4.0]] * 8
    start = (3, 0, 3, 0, 3, 0, 3, 0)
    measure = Coupled()
    found = evolve(costs, start, 20.0, measure, Evolution(40, 16))
    assert found.losses[0] == Coupled()(start, STAGES - 1, 0)
    assert list(found.losses) == sorted(found.losses, reverse=True)
    assert found.losses[-1] == Coupled()(found.choice, STAGES - 1, 9)
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert total(costs, found.choice) <= 20.0
    counts = [sum(stage == k and generation == 1 for _, stage, generation in measure.calls) for k in range(STAGES)]
    assert counts == [16, 4, 1]
    assert len(set(measure.calls)) == len(measure.calls)


def test_the_same_seed_gives_the_same_and_another_another():
    costs = [[1.0, 2.0, 3.0, 4.0]] * 8

    def tried(seed):
        measure = Coupled()
        evolve(costs, (1,) * 8, 16.0, measure, Evolution(3, 8, seed))
        return measure.calls

    assert tried(1) == tried(1)
    assert tried(1) != tried(2)


def test_where_nothing_can_move_the_start_stays():
    found = evolve([[1.0], [2.0]], (0, 0), 3.0, lambda *_: 1.0, Evolution(3, 4))
    assert (found.choice, found.losses) == ((0, 0), (1.0,) * 4)
