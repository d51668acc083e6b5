"""Laws of the step plan: rows are a pure function of (seed, g), passes are whole, world sizes do not matter."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pais_ray.data.plan import StepPlan, rows_of


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


@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=6))
def test_over_any_sequence_of_world_sizes_no_row_is_skipped_doubled_or_shared(sizes):
    g_next, seen = 0, []
    for world, steps, accumulation in sizes:
        total = world * steps * accumulation
        per_rank = [list(rows_of(g_next, total, world, rank)) for rank in range(world)]
        assert {len(rows) for rows in per_rank} == {steps * accumulation}
        for step in range(steps):  # at a step, rank r with accumulation i takes g_next + i * W + r
            for rank in range(world):
                for i in range(accumulation):
                    assert per_rank[rank][step * accumulation + i] == g_next + (step * accumulation + i) * world + rank
        seen += [g for rows in per_rank for g in rows]
        g_next += total
    assert Counter(seen) == Counter(range(g_next))


def test_an_empty_part_is_refused_by_name():
    with pytest.raises(ValueError, match=r"batch.unlabeled=3: the data set has no unlabeled images"):
        make(num_unlabeled=0)
