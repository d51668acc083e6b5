"""The step plan: rows are a pure function of (seed, g), passes are complete, and the world size does not matter."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pais_ray.data.stream.plan import StepPlan, count_labeled_only_steps, rank_rows, rank_rows_per_step


def make(seed=0, num_labeled=5, num_unlabeled=7, labeled=1, unlabeled=3):
    return StepPlan(
        seed=seed, num_labeled=num_labeled, num_unlabeled=num_unlabeled, labeled=labeled, unlabeled=unlabeled
    )


def in_shards(groups, unlabeled=3, lanes=1, seed=0):
    """A plan without labeled images, with unlabeled images in row groups of these sizes."""
    return StepPlan(
        seed=seed,
        num_labeled=0,
        num_unlabeled=sum(groups),
        labeled=0,
        unlabeled=unlabeled,
        unlabeled_groups=tuple(groups),
        lanes=lanes,
    )


def walk(plan, rows):
    return [tuple(np.concatenate(plan.row(g)).tolist()) for g in rows]


def test_rows_depend_on_the_seed():
    assert walk(make(seed=4), range(50)) == walk(make(seed=4), range(50))
    assert walk(make(seed=4), range(50)) != walk(make(seed=5), range(50))


def test_the_order_is_stable_between_versions():
    # A change of this order breaks resuming every earlier run.
    assert walk(make(), range(4)) == [(3, 4, 5, 1), (2, 6, 2, 0), (1, 3, 2, 1), (0, 4, 6, 0)]


@given(
    num_labeled=st.integers(1, 9),
    num_unlabeled=st.integers(1, 20),
    labeled=st.integers(1, 4),
    unlabeled=st.integers(0, 5),
)
def test_every_pass_has_every_image_once(num_labeled, num_unlabeled, labeled, unlabeled):
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
def test_steps_see_the_same_rows_for_any_sequence_of_world_sizes(per_step, groups):
    g_next, seen = 0, []
    for world, steps in groups:
        world = min(world, per_step)
        ranks = [rank_rows(g_next, steps, per_step, world, rank) for rank in range(world)]
        for step in range(steps):
            taken = []
            for rank, rows in enumerate(ranks):
                here = rank_rows_per_step(per_step, world, rank)
                assert here in (per_step // world, -(-per_step // world))
                assert len(rows) == here * steps
                taken += [rows[step * here + i] for i in range(here)]
            assert sorted(taken) == list(range(g_next, g_next + per_step))
            seen += taken
            g_next += per_step
    assert Counter(seen) == Counter(range(g_next))


def test_rows_are_distributed_in_rounds():
    assert [list(rank_rows(10, 2, 4, 2, rank)) for rank in range(2)] == [[10, 12, 14, 16], [11, 13, 15, 17]]
    assert [list(rank_rows(0, 2, 3, 2, rank)) for rank in range(2)] == [
        [1, 4],
        [0, 2, 3, 5],
    ]  # rank 0 has no row in the first round
    with pytest.raises(ValueError, match=r"3 workers cannot share 2 rows"):
        rank_rows(0, 1, 2, 3, 0)


def test_an_empty_part_is_refused():
    with pytest.raises(ValueError, match=r"batch.unlabeled=3: the data set has no unlabeled images"):
        make(num_unlabeled=0)


shard_plans = st.builds(
    in_shards,
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    unlabeled=st.integers(1, 5),
    lanes=st.integers(1, 9),
    seed=st.integers(0, 3),
)


@given(plan=shard_plans)
def test_every_pass_over_shards_has_every_image_once_over_all_lanes(plan):
    size, passes = plan.num_unlabeled, 4
    drawn = np.concatenate([plan.row(g)[1] for g in range(-(-passes * size // plan.unlabeled))])
    for start in range(0, passes * size, size):
        assert sorted(drawn[start : start + size]) == list(range(size))


@given(plan=shard_plans)
def test_each_lane_reads_one_group_after_the_other(plan):
    size, lanes = plan.num_unlabeled, plan.lanes
    group_of = np.repeat(np.arange(len(plan.unlabeled_groups)), plan.unlabeled_groups)
    walked = [[] for _ in range(lanes)]  # groups that each lane visits in the second pass, one after the other
    for g in range(-(-2 * size // plan.unlabeled)):
        for slot, image in enumerate(plan.row(g)[1]):
            group = group_of[image]
            if size <= g * plan.unlabeled + slot < 2 * size and walked[g % lanes][-1:] != [group]:
                walked[g % lanes].append(group)
    assert all(len(groups) == len(set(groups)) for groups in walked), "a lane returns to a group"
    assert sum(map(len, walked)) <= len(plan.unlabeled_groups) + lanes - 1, "lanes share groups inside"


@given(size=st.integers(1, 30), unlabeled=st.integers(1, 5), lanes=st.integers(1, 5))
def test_the_order_of_plain_files_does_not_depend_on_lanes(size, unlabeled, lanes):
    plain = make(1, 1, size, 0, unlabeled)
    laned = StepPlan(seed=1, num_labeled=1, num_unlabeled=size, labeled=0, unlabeled=unlabeled, lanes=lanes)
    assert walk(plain, range(40)) == walk(laned, range(40))


def test_the_order_of_shards_is_stable_between_versions():
    plan = in_shards([3, 3, 3, 2], unlabeled=2, lanes=2)
    rows = [plan.row(g)[1].tolist() for g in range(11)]
    # As above: no run made before it could go on.
    assert rows == [[5, 4], [0, 1], [3, 8], [2, 10], [7, 6], [9, 1], [6, 8], [2, 0], [7, 3], [10, 9], [4, 5]]


@pytest.mark.parametrize(("first", "last", "expected"), [(0, 300, 220), (100, 300, 120), (220, 300, 0), (0, 50, 50)])
def test_steps_of_the_burn_in_are_counted_from_any_step(first, last, expected):
    def weight(step: int) -> float:
        return 1.5 if step >= 220 else 0.0

    assert count_labeled_only_steps(weight, first, last) == expected


@given(per_step=st.integers(1, 9), world=st.integers(1, 9), steps=st.integers(0, 6), labeled_only=st.integers(0, 9))
def test_the_burn_in_of_a_rank_covers_whole_steps_and_changes_no_row(per_step, world, steps, labeled_only):
    for rank in range(min(world, per_step)):
        plain = rank_rows(7, steps, per_step, min(world, per_step), rank)
        burned_in = rank_rows(7, steps, per_step, min(world, per_step), rank, labeled_only_steps=labeled_only)
        assert list(plain) == list(burned_in)
        assert plain.num_labeled_only == 0
        assert burned_in.num_labeled_only == min(steps, labeled_only) * burned_in.per_step_and_rank
