"""Laws of the step plan: rows are a pure function of (seed, g), passes are whole, world sizes do not matter."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pais_ray.data.plan import StepPlan, rows_here, rows_of


def make(seed=0, num_labeled=5, num_unlabeled=7, labeled=1, unlabeled=3):
    return StepPlan(
        seed=seed, num_labeled=num_labeled, num_unlabeled=num_unlabeled, labeled=labeled, unlabeled=unlabeled
    )


def walk(plan, rows):
    return [tuple(np.concatenate(plan.row(g)).tolist()) for g in rows]


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    assert walk(make(seed=4), range(50)) == walk(make(seed=4), range(50))
    assert walk(make(seed=4), range(50)) != walk(make(seed=5), range(50))


def test_the_order_is_fixed_for_good():
    # A change of this order breaks the resume of every run made before it.
    assert walk(make(), range(4)) == [(3, 4, 5, 1), (2, 6, 2, 0), (1, 3, 2, 1), (0, 4, 6, 0)]


@given(
    num_labeled=st.integers(1, 9),
    num_unlabeled=st.integers(1, 20),
    labeled=st.integers(1, 4),
    unlabeled=st.integers(0, 5),
)
def test_every_pass_holds_every_image_once(num_labeled, num_unlabeled, labeled, unlabeled):
    plan = make(3, num_labeled, num_unlabeled, labeled, unlabeled)
    passes = 3
    rows = range(passes * num_labeled * num_unlabeled)
    for part, size in ((0, num_labeled), (1, num_unlabeled)):
        drawn = np.concatenate([plan.row(g)[part] for g in rows])
        for start in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[start : start + size]) == list(range(size))


def test_passes_are_reshuffled():
    plan = make(num_labeled=50, labeled=50, unlabeled=0)
    assert plan.row(0)[0].tolist() != plan.row(1)[0].tolist()


@given(per_step=st.integers(1, 9), groups=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), max_size=6))
def test_over_any_sequence_of_world_sizes_steps_see_the_same_rows(per_step, groups):
    g_next, seen = 0, []
    for world, steps in groups:
        world = min(world, per_step)
        ranks = [rows_of(g_next, steps, per_step, world, rank) for rank in range(world)]
        for step in range(steps):
            taken = []
            for rank, rows in enumerate(ranks):
                here = rows_here(per_step, world, rank)
                assert here in (per_step // world, -(-per_step // world))
                assert len(rows) == here * steps
                taken += [rows[step * here + i] for i in range(here)]
            assert sorted(taken) == list(range(g_next, g_next + per_step))
            seen += taken
            g_next += per_step
    assert Counter(seen) == Counter(range(g_next))


def test_rows_that_divide_evenly_are_dealt_in_turns():
    assert [list(rows_of(10, 2, 4, 2, rank)) for rank in range(2)] == [[10, 12, 14, 16], [11, 13, 15, 17]]
    assert [list(rows_of(0, 2, 3, 2, rank)) for rank in range(2)] == [[1, 4], [0, 2, 3, 5]]  # the first round lacks one
    with pytest.raises(ValueError, match=r"3 workers cannot share 2 rows"):
        rows_of(0, 1, 2, 3, 0)


def test_an_empty_part_is_refused_by_name():
    with pytest.raises(ValueError, match=r"batch.unlabeled=3: the data set has no unlabeled images"):
        make(num_unlabeled=0)
