"""The loop of one rank: what is saved and evaluated and in which order, and a whole run in this process without Ray."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.train.torch
import torch
from safetensors.torch import load_file

from pais_ray.config.tree import compose, rows_per_step, run_schedule
from pais_ray.data.stream.batches import load_batches
from pais_ray.data.stream.plan import StepPlan
from pais_ray.data.stream.rows import build_tables
from pais_ray.files.json_lines import metric_rows
from pais_ray.runs import prepare
from pais_ray.runs.checkpoints import checkpoint_folder
from pais_ray.runs.directory import write_run_directory
from pais_ray.train.errors import TrainingEnded
from pais_ray.train.job import Job
from pais_ray.train.step import StepSettings
from pais_ray.train.worker import loop, worker
from pais_ray.train.worker.loop import TrainingLoop
from pais_ray.train.worker.resume import ResumePoint
from tests.support.tiny import state_of
from tests.support.worker import Rank, RecordingHeartbeat, RecordingMonitor

STEPS = 8
WORDS = ["synthetic", "mask_rcnn", "pais", f"train.steps={STEPS}", "train.eval_every=4", "train.checkpoint_every=2"]


class Calls:
    """Stands for the evaluator and for the checkpointer, and records what is called on them."""

    def __init__(self) -> None:
        self.made = []
        self.unscored_steps = set()
        self.evaluate = lambda: self.made.append("evaluate")
        self.save = lambda unscored_steps: self.made.append("save")
        self.save_and_wait = lambda unscored_steps: self.made.append("save and wait")

    def collect_scores(self, up_to: int) -> None:
        self.made.append(f"collect {up_to}")


@pytest.mark.parametrize(
    ("step", "stopped", "save_requested", "skipped_in_row", "expected"),
    [
        (4, False, False, 0, ["collect 3", "save", "evaluate"]),
        (2, False, False, 0, ["collect 1", "save"]),
        (3, False, False, 0, []),
        (2, False, False, 1, ["collect 1"]),  # the weights may be the reason for the skipped steps
        (3, False, True, 0, ["save", "collect 2"]),
        (4, False, True, 0, ["save", "collect 3", "collect 3", "save", "evaluate"]),
        (4, True, False, 0, ["save and wait", "collect 4"]),  # the next start evaluates
        (8, False, False, 0, ["collect 7", "save and wait", "evaluate", "collect 8"]),
        (8, True, False, 0, ["collect 7", "save and wait", "evaluate", "collect 8"]),
    ],
)
def test_order_of_checkpoint_and_evaluation_after_a_step(
    tmp_path, step, stopped, save_requested, skipped_in_row, expected
):
    rank, calls = Rank(tmp_path, compose(WORDS), state_of()), Calls()
    rank.state.step, rank.state.skipped_in_row = step, skipped_in_row
    rank.heartbeat.save = save_requested
    loop = loop_of(rank, evaluator=calls, checkpointer=calls)
    loop.checkpoint_and_evaluate(stopped)
    assert calls.made == expected
    assert rank.heartbeat.save is False, "a request is served once"


def test_a_run_ends_at_stop_at_and_at_the_end_of_the_schedule(tmp_path):
    for stop_at, last in ((None, STEPS), (6, 6), (99, STEPS)):
        config = compose([*WORDS, f"train.stop_at={'null' if stop_at is None else stop_at}"])
        assert loop_of(Rank(tmp_path, config, state_of())).last_step == last


def test_the_start_reports_what_the_run_resumes_from(tmp_path):
    rank = Rank(tmp_path, compose([*WORDS, "batch.accumulation_steps=3"]), state_of())
    loop_of(rank, skipped=["step_00000009: damaged"]).report_start()
    assert [event["event"] for event in rank.logger.events] == ["start", "checkpoint_passed_over"]
    assert rank.logger.events[0]["text"] == "1 workers, 3 rows per step, 3 per worker"
    assert rank.logger.events[1]["text"] == "checkpoint skipped: step_00000009: damaged"


class Local:
    """Runs of the small segmentor in this process. Ray is replaced: one rank, and scores that are computed at once."""

    def __init__(self, data, storage, monkeypatch) -> None:
        self.data, self.storage, self.heartbeat = data, storage, RecordingHeartbeat()
        device = torch.device("cpu")
        context = SimpleNamespace(
            get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0, get_node_rank=lambda: 0
        )
        runtime_context = SimpleNamespace(get_node_id=lambda: "node")
        monkeypatch.setattr(ray, "get", lambda value: value)
        monkeypatch.setattr(ray, "remote", lambda **_: lambda function: SimpleNamespace(remote=function))
        monkeypatch.setattr(ray, "get_runtime_context", lambda: runtime_context)
        monkeypatch.setattr(ray.train, "get_context", lambda: context)
        monkeypatch.setattr(ray.train.torch, "get_device", lambda: device)
        monkeypatch.setattr(worker, "Heartbeat", lambda *_: self.heartbeat)
        monkeypatch.setattr(loop, "stream_batches", lambda feed, *args: load_batches(feed.plan, feed.tables, *args))

    def train(self, name: str, *more: str, stop: bool = False, save: bool = False) -> Path:
        """Start the run ``name``, or resume it; returns its directory."""
        root = self.storage / name
        config, data = prepare.prepare(compose(self.words(*more)))
        schedule = run_schedule(config)
        write_run_directory(root, config, data, schedule)
        plan = StepPlan(
            seed=config.train.seed,
            num_labeled=len(data.labeled),
            num_unlabeled=len(data.unlabeled),
            labeled=config.batch.labeled,
            unlabeled=config.batch.unlabeled,
            lanes=rows_per_step(schedule, config),
        )
        job = Job(
            config=config,
            schedule=schedule,
            root=root,
            categories=data.train.categories,
            feed=SimpleNamespace(plan=plan, tables=build_tables(data.labeled, data.unlabeled)),
            val=data.val,
            ground_truth=data.truth,
            monitor=RecordingMonitor(),
            threads=1,
        )
        self.heartbeat.stop, self.heartbeat.save, self.monitor = stop, save, job.monitor
        worker.run({"job": job})
        return root

    def words(self, *more: str) -> list[str]:
        return [
            *("segmentor.name=tests.support.small_segmentor", "method.name=pais", "optim.name=sgd", "optim.lr=0.005"),
            *(f"data.train={self.data}/train.json", f"data.val={self.data}/val.json"),
            *(f"data.images={self.data}/images", "data.image_size=64", "data.labeled=0.25"),
            *("batch.labeled=1", "batch.unlabeled=1", "batch.accumulation_steps=2"),
            *("method.burn_in=2", "method.tau_cls=0.1", "method.tau_iou=0", f"train.steps={STEPS}"),
            *("train.eval_every=4", "train.checkpoint_every=2", "train.log_every=1", "train.keep_checkpoints=9"),
            *("tracking.enabled=false", *more),
        ]


@pytest.fixture(scope="module")
def undisturbed(tiny_coco, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Local(tiny_coco, tmp_path_factory.mktemp("runs"), monkeypatch).train("undisturbed")


@pytest.fixture
def local(tiny_coco, tmp_path, monkeypatch):
    return Local(tiny_coco, tmp_path, monkeypatch)


def assert_same_run(root, other) -> None:
    for name in ("student", "teacher", "optimizer"):
        a, b = (load_file(checkpoint_folder(r, STEPS) / f"{name}.safetensors") for r in (root, other))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert metrics_of(root) == metrics_of(other)


def metrics_of(root) -> list[dict]:
    """Without times and memory."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("time", "system/"))} for row in metric_rows(root)]
    return sorted((row for row in rows if len(row) > 1), key=lambda row: (row["step"], sorted(row)))


def test_a_run_writes_metrics_of_all_steps_and_scores_of_all_evaluations(undisturbed):
    rows = metric_rows(undisturbed)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    for role in ("teacher", "student"):
        assert [row["step"] for row in rows if f"{role}/segm_AP" in row] == [4, STEPS]
    unlabeled = {row["step"] for row in rows if "unlabeled/mask" in row}
    assert unlabeled == set(range(3, STEPS + 1)), "none during the burn-in"


def test_a_run_that_ends_early_and_resumes_equals_an_undisturbed_one(local, undisturbed):
    local.train("halves", "train.stop_at=5")
    assert_same_run(local.train("halves"), undisturbed)


def test_a_run_stopped_before_its_evaluation_evaluates_when_it_resumes(local, undisturbed):
    for step in range(1, 5):  # the stop is requested in each step; that of step 4 leaves out the evaluation
        root = local.train("stopped", stop=True)
        assert max(row["step"] for row in metric_rows(root)) == step
    assert not any("teacher/segm_AP" in row for row in metric_rows(root))
    assert_same_run(local.train("stopped"), undisturbed)


def test_a_requested_checkpoint_is_written_at_once(local):
    root = local.train("saved", "train.stop_at=3", save=True)
    assert checkpoint_folder(root, 1).is_dir()


def test_an_error_that_would_recur_is_reported_and_not_raised(local, monkeypatch):
    def fail(*_, **__):
        raise TrainingEnded("nothing is learned")

    monkeypatch.setattr(loop, "train_step", fail)
    local.train("ended")
    (error,) = local.monitor.fatal_errors
    assert (error.text, error.is_input_error) == ("nothing is learned", False)
    assert local.heartbeat.stages[-1] == "closed"


def test_other_errors_are_raised_and_recorded_with_the_rank(local, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("connection closed by peer\nsecond line")

    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(RuntimeError):
        local.train("failed")
    assert local.monitor.fatal_errors == []
    event = json.loads((local.storage / "failed" / "events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["rank"], event["step"]) == ("failed", 0, 0)
    assert event["text"] == "a worker failed (RuntimeError: connection closed by peer); the workers restart"


VERSION_0_1 = Path(__file__).resolve().parents[1] / "fixtures" / "run_0_1"  # these settings, 6 steps, trained on Ray


def test_training_gives_the_weights_of_version_0_1(undisturbed):
    for name in ("student", "teacher", "optimizer"):
        assert_close(*(checkpoint_folder(root, 6) / f"{name}.safetensors" for root in (undisturbed, VERSION_0_1)))


def test_a_run_of_version_0_1_resumes(local, undisturbed):
    shutil.copytree(VERSION_0_1, local.storage / "old")
    root = local.train("old")
    assert [row["step"] for row in metric_rows(root) if "loss" in row] == list(range(1, STEPS + 1))
    for name in ("student", "teacher", "optimizer"):
        assert_close(*(checkpoint_folder(r, STEPS) / f"{name}.safetensors" for r in (root, undisturbed)))


def assert_close(path, other) -> None:
    """Not to the last bit: another processor may compute other roundings than the one that wrote the fixture."""
    a, b = load_file(path), load_file(other)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def loop_of(rank, skipped=(), **parts) -> TrainingLoop:
    resume = ResumePoint(checkpoint=None, skipped=list(skipped), unscored=None, metrics=[], attempt=1.0)
    present = {"evaluator": rank.evaluator, "checkpointer": rank.checkpointer, **parts}
    return TrainingLoop(
        job=rank.job,
        resume=resume,
        state=rank.state,
        network=rank.state.student,
        settings=StepSettings(schedule=rank.job.schedule, rows=rows_per_step(rank.job.schedule, rank.config)),
        group=rank.group,
        heartbeat=rank.heartbeat,
        logger=rank.logger,
        recovery=rank.recovery,
        **present,
    )
