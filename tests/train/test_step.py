"""Algorithm 1, without Ray: a list of batches drives the step."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pais_ray.data.stream.plan import rank_rows
from pais_ray.modeling.methods.pais import PAIS
from pais_ray.modeling.methods.supervised import Supervised
from pais_ray.structures.batch import Batch, Predictions
from pais_ray.structures.masks import Masks
from pais_ray.train.state import Teacher
from pais_ray.train.step import (
    BackwardOutOfMemoryError,
    StepSettings,
    batch_losses,
    highest_scores,
    train_step,
    update_ema,
)
from tests.support.servers import free_port
from tests.support.tiny import state_of, tiny_batch, tiny_schedule

SETTINGS = StepSettings(schedule=tiny_schedule(), seed=1)


def parameters(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class ConfidentTeacher(Teacher):
    """A teacher with one confident prediction per image; an untrained one proposes nothing."""

    def predict(self, images, score_threshold=None):
        return [one_prediction(images) for _ in range(len(images))]


def one_prediction(images):
    box = torch.tensor([[10.0, 12.0, 50.0, 44.0]])
    masks = Masks.in_boxes(torch.ones(1, 28, 28), box)
    return Predictions(
        boxes=box, labels=torch.tensor([1]), scores=torch.tensor([0.9]), ious=torch.tensor([0.8]), masks=masks
    )


def test_a_step_updates_the_student_and_averages_it_into_the_teacher_with_the_decay_of_the_method():
    state = state_of()
    before = parameters(state.student)
    method = PAIS(burn_in=0)
    for expected in (0.0, 0.5):  # running mean: 1 - 1/(k+1)
        teacher = parameters(state.teacher.segmentor)
        result = train_step(state, state.student, [tiny_batch()], method, SETTINGS)
        assert result.metrics["ema_decay"] == expected
        student = parameters(state.student)
        for name, value in parameters(state.teacher.segmentor).items():
            torch.testing.assert_close(value, expected * teacher[name] + (1 - expected) * student[name])
    assert not equal(before, parameters(state.student))
    assert state.step == 2


def test_the_same_batches_give_the_same_weights():
    ends = []
    for _ in range(2):
        state = state_of()
        for g in range(3):
            train_step(state, state.student, [tiny_batch(g)], PAIS(), SETTINGS)
        ends.append(parameters(state.student))
    assert equal(*ends)


@pytest.mark.parametrize(("method", "step"), [(PAIS(burn_in=5), 4), (Supervised(), 4)])
def test_without_a_weight_of_the_unlabeled_term_there_are_only_labeled_losses(method, step):
    state, batch = state_of(), tiny_batch()
    state.teacher.__class__ = ConfidentTeacher
    losses, metrics = batch_losses(state.student, state.teacher, batch, method, step)
    expected = {"objectness", "proposal_box", "class", "box", "mask", "mask_iou"}
    assert losses.keys() == {f"labeled/{name}" for name in expected}
    assert metrics == {}
    trained = PAIS(burn_in=5)
    losses, metrics = batch_losses(state.student, state.teacher, batch, trained, step=5)
    assert losses.keys() == {f"{part}/{name}" for part in ("labeled", "unlabeled") for name in expected}
    assert metrics["pseudo/images"] == len(batch.weak)


def test_unlabeled_losses_are_the_losses_of_the_student_times_lambda():
    state, batch = state_of(), tiny_batch()
    state.teacher.__class__ = ConfidentTeacher
    ends = []
    for value in (1.0, 2.0):
        torch.manual_seed(0)
        losses, metrics = batch_losses(state.student, state.teacher, batch, PAIS(lambda_unlabeled=value), step=0)
        ends.append(losses)
        assert metrics["pseudo/kept"] == len(batch.weak)
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        factor = 2.0 if name.startswith("unlabeled/") else 1.0
        torch.testing.assert_close(ends[1][name], factor * ends[0][name])
    assert ends[0]["unlabeled/mask_iou"] == 0  # learned from labeled images only
    assert ends[0]["unlabeled/mask"] > 0


def test_pseudo_labels_are_warped_to_the_strong_view():
    """The targets of the student are the pseudo-boxes of the weak view, transformed by weak_to_strong."""
    batch = tiny_batch()
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, images, targets):
            seen.append(targets)
            return {"class": torch.zeros(())}

    teacher = Teacher(torch.nn.Linear(1, 1))
    teacher.__class__ = ConfidentTeacher
    batch_losses(Spy(), teacher, batch, PAIS(), step=0)
    strong = seen[1]
    assert len(strong) == len(batch.strong) == 2
    for i, target in enumerate(strong):
        matrix = batch.strong.matrix[i] @ torch.linalg.inv(batch.weak.matrix[i])
        corners = torch.tensor([[10.0, 12, 1], [50, 12, 1], [50, 44, 1], [10, 44, 1]]) @ matrix.T
        height, width = batch.strong.sizes[i].tolist()
        low, high = corners[:, :2].amin(0), corners[:, :2].amax(0)
        expected = torch.cat([low, high]).clamp(torch.zeros(4), torch.tensor([width, height, width, height]))
        torch.testing.assert_close(target.boxes[0], expected.float(), rtol=1e-4, atol=1e-3)


def test_accumulation_averages_the_micro_batches():
    batches = [tiny_batch(0), tiny_batch(1)]
    states = [state_of(), state_of(), state_of()]
    gradients = []
    for state, part in zip(states, (batches[:1], batches[1:], batches), strict=True):
        train_step(state, state.student, part, PAIS(), StepSettings(schedule=tiny_schedule(), seed=1))
        gradients.append([p.grad.clone() for p in state.student.parameters()])
    for first, second, both in zip(*gradients, strict=True):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    state = state_of()
    train_step(state, state.student, [tiny_batch(0)], PAIS(), SETTINGS)
    before = parameters(state.student), parameters(state.teacher.segmentor)
    bad = tiny_batch(1)
    bad.labeled.images[0, 0, 0, 0] = torch.nan
    for expected in (1, 2):
        result = train_step(state, state.student, [bad], PAIS(), SETTINGS)
        assert result.skipped
        assert (state.skipped, state.skipped_in_row) == (expected, expected)
    assert equal(before[0], parameters(state.student))
    assert equal(before[1], parameters(state.teacher.segmentor))
    result = train_step(state, state.student, [tiny_batch(2)], PAIS(), SETTINGS)
    assert not result.skipped
    assert (state.skipped, state.skipped_in_row, state.step) == (2, 0, 4)


def test_clipping_bounds_the_gradient_and_the_logged_norm_is_from_before():
    state = state_of()
    settings = StepSettings(schedule=tiny_schedule(), seed=1, clip_norm=1e-3)
    result = train_step(state, state.student, [tiny_batch()], Supervised(), settings)
    norm = torch.stack([p.grad.norm() for p in state.student.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert result.metrics["grad_norm"] > 1e-2


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_in_each_precision_is_finite_and_keeps_weights_in_fp32(precision):
    state = state_of()
    result = train_step(
        state,
        state.student,
        [tiny_batch()],
        PAIS(),
        StepSettings(schedule=tiny_schedule(), precision=precision),
    )
    assert torch.isfinite(result.metrics["loss"])
    assert all(v.dtype == torch.float32 for v in parameters(state.teacher.segmentor).values() if v.is_floating_point())


def test_after_a_skipped_step_with_a_loss_scaler_the_next_step_trains():
    state = state_of()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    bad = tiny_batch(1)
    bad.labeled.images[0, 0, 0, 0] = torch.nan
    assert train_step(state, state.student, [bad], PAIS(), SETTINGS).skipped
    before = parameters(state.student)
    assert not train_step(state, state.student, [tiny_batch(2)], PAIS(), SETTINGS).skipped
    assert not equal(before, parameters(state.student))


def test_a_loss_scale_that_is_too_high_changes_only_the_scale():
    """torch calls a fused optimizer even then, and its first step would leave uninitialized momenta."""
    state = state_of()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**127)
    before = [parameters(m) for m in (state.student, state.teacher)]
    result = train_step(state, state.student, [tiny_batch(1)], PAIS(), SETTINGS)
    assert (result.skipped, result.grad_norm) == (False, math.inf)
    assert [equal(a, parameters(m)) for a, m in zip(before, (state.student, state.teacher), strict=True)] == [True] * 2
    assert not any("momentum_buffer" in slots for slots in state.optimizer.state.values())
    assert state.scaler.get_scale() == 2.0**126


def test_a_backward_pass_out_of_memory_reports_the_number_of_pseudo_labels():
    class Crowded(Teacher):
        def predict(self, images, score_threshold=None):
            return [one_prediction(images)[torch.zeros(5 - i, dtype=torch.long)] for i in range(len(images))]

    def no_memory(grad):
        raise torch.OutOfMemoryError("asked for 7 GiB")

    state = state_of()
    state.teacher.__class__ = Crowded
    next(p for p in state.student.parameters() if p.requires_grad).register_hook(no_memory)
    with pytest.raises(BackwardOutOfMemoryError, match="7 GiB") as raised:
        train_step(state, state.student, [tiny_batch(1)], PAIS(burn_in=0), SETTINGS)
    assert raised.value.pseudo_labels == 5
    with pytest.raises(BackwardOutOfMemoryError) as raised:
        train_step(state, state.student, [tiny_batch(1)], Supervised(), SETTINGS)
    assert raised.value.pseudo_labels == 0


def test_the_teacher_never_enters_train_mode():
    state = state_of()
    state.teacher.train()
    assert not any(m.training for m in state.teacher.modules())
    assert not any(p.requires_grad for p in state.teacher.parameters())


def test_the_moving_average_copies_integer_buffers():
    student = torch.nn.BatchNorm1d(2)
    teacher = copy.deepcopy(student)
    student.running_mean += 4.0
    student.num_batches_tracked += 7
    update_ema(teacher, student, decay=0.75)
    assert teacher.running_mean.tolist() == [1.0, 1.0]
    assert teacher.num_batches_tracked == 7


def _rank(rank: int, port: int, out: str) -> None:
    """One of two DDP ranks of the tests below, in one process because starting it takes most of the time."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(_steps_with_unequal_pseudo_labels(rank), f"{out}/unequal_{rank}.pt")
    torch.save(_steps_with_shared_rows(rank), f"{out}/shared_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rank_results(tmp_path_factory):
    """What the functions below return on both ranks, by the name of the file."""
    out = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(free_port(), str(out)), nprocs=2)
    return {path.stem: torch.load(path, weights_only=True) for path in out.iterdir()}


def _steps_with_unequal_pseudo_labels(rank: int):
    """Pseudo-labels on one rank only, on none, and an image without instances; then a step that one rank skips."""
    state = state_of()
    network = torch.nn.parallel.DistributedDataParallel(state.student, broadcast_buffers=False)
    for g, teacher in enumerate(("confident" if rank == 0 else "plain", "plain", "confident")):
        state.teacher.__class__ = ConfidentTeacher if teacher == "confident" else Teacher
        batch = tiny_batch(10 * rank + g)
        if g == 1 and rank == 1:
            batch = Batch(
                labeled=batch.labeled,
                targets=[t[:0] for t in batch.targets],
                weak=batch.weak,
                strong=batch.strong,
            )
        train_step(state, network, [batch], PAIS(), SETTINGS)
    bad = tiny_batch(50 + rank)
    if rank == 1:
        bad.labeled.images[0, 0, 0, 0] = torch.nan
    skipped = train_step(state, network, [bad], PAIS(), SETTINGS, stop=rank == 1)
    return parameters(state.student), skipped.skipped, skipped.stop


def test_ranks_stay_synchronized_with_different_numbers_of_pseudo_labels(rank_results):
    (first, *flags), (second, *other) = (rank_results[f"unequal_{rank}"] for rank in range(2))
    assert equal(first, second)
    assert flags == other == [True, True]  # a NaN and a stop request of one rank hold for all


class Greedy(PAIS):
    """Runs out of memory in the forward passes."""

    def pseudo_labels(self, predictions):
        raise torch.OutOfMemoryError("out of memory")


def _steps_with_shared_rows(rank: int):
    """Three rows per step over two ranks; then a step for which the memory of one rank does not suffice."""
    state = state_of()
    network = torch.nn.parallel.DistributedDataParallel(state.student, broadcast_buffers=False)
    settings = dataclasses.replace(SETTINGS, rows=3, cpu_group=dist.new_group(backend="gloo"))
    mine = rank_rows(0, 2, 3, 2, rank)
    for _ in range(2):
        batches = [tiny_batch(mine[i + 2 * state.step if rank else state.step]) for i in range(1 + rank)]
        train_step(state, network, [None] * (2 - len(batches)) + batches, PAIS(), settings)
    before = parameters(state.student)
    method = Greedy() if rank == 0 else PAIS()
    result = train_step(state, network, [tiny_batch(7 + rank)], method, dataclasses.replace(settings, rows=2))
    assert result.skipped
    assert not result.fits
    assert equal(before, parameters(state.student))
    assert (state.step, state.skipped) == (3, 1)
    train_step(state, network, [tiny_batch(9 + rank)], PAIS(), dataclasses.replace(settings, rows=2))
    return before, parameters(state.student)


def test_a_step_does_not_depend_on_the_number_of_ranks(rank_results):
    """Three rows on one rank, and on two of which one has fewer. If one rank runs out of memory, all skip the step."""
    ends = [rank_results[f"shared_{rank}"] for rank in range(2)]
    assert equal(ends[0][1], ends[1][1]), "after the skipped step the ranks are still synchronized"
    assert not equal(ends[0][0], ends[0][1])
    alone = state_of()
    for step in range(2):
        rows = [tiny_batch(g) for g in range(3 * step, 3 * step + 3)]
        train_step(alone, alone.student, rows, PAIS(), dataclasses.replace(SETTINGS, rows=3))
    for name, value in parameters(alone.student).items():
        torch.testing.assert_close(ends[0][0][name], value, rtol=1e-4, atol=1e-6)


def test_the_limit_keeps_the_highest_scores_in_their_order():
    boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(4, 1)
    many = Predictions(
        boxes=boxes,
        labels=torch.arange(4),
        scores=torch.tensor([0.5, 0.9, 0.4, 0.8]),
        ious=torch.ones(4),
        masks=Masks.in_boxes(torch.ones(4, 28, 28), boxes),
    )
    assert highest_scores(many, 3).labels.tolist() == [0, 1, 3]
    assert highest_scores(many, 4) is many


@pytest.mark.parametrize("dropped", [False, True])
def test_a_teacher_that_is_not_finite_causes_a_skipped_step(dropped):
    """Also if the threshold has dropped all its predictions."""

    class Broken(Teacher):
        def predict(self, images, score_threshold=None):
            (first, *others) = [one_prediction(images) for _ in range(len(images))]
            if dropped:
                return [dataclasses.replace(first[:0], finite=torch.tensor(False)), *others]
            return [dataclasses.replace(first, ious=torch.tensor([torch.nan])), *others]

    state = state_of()
    state.teacher.__class__ = Broken
    before = parameters(state.student)
    assert train_step(state, state.student, [tiny_batch()], PAIS(), SETTINGS).skipped
    assert equal(before, parameters(state.student))
