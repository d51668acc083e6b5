"""Run directories as training leaves them, written by hand for tests of MLflow: metrics, checkpoints, figures."""

import json
import time
from pathlib import Path

from pais_ray.tracking.logger import build_logger
from pais_ray.tracking.record import Status
from pais_ray.tracking.settings import TrackingConfig
from pais_ray.tracking.tracker import open_run

DATASETS = {
    "training": {"name": "train", "source": "/data/train.json", "sha256": "a" * 64, "images": 12, "labeled": 3},
    "validation": {"name": "val", "source": "https://me:pw@host/val.json", "sha256": "b" * 64, "images": 4},
}


def open_test_run(storage: Path, name: str, config: TrackingConfig | None = None, **more: object) -> Path:
    """The directory of a run; its MLflow run is open if the store is available."""
    params = {"optim.lr": 0.01, "data.train": "x" * 1000, "method.tau_cls": 0.35}
    arguments = {"params": params, "tags": {"fold": "1", "split_sha256": "c" * 64}, "datasets": DATASETS, **more}
    open_run(config or TrackingConfig(), storage, name, **arguments)
    return storage / name


def write_row(root: Path, step: int, **values: float | None) -> None:
    """Append a row to metrics.jsonl; no two rows have the same time."""
    path = root / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    clock = max([time.time(), *(json.loads(line)["time"] + 0.001 for line in lines[-1:])])
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "time": round(clock, 3), **values}) + "\n")


def write_checkpoint(root: Path, step: int) -> Path:
    """A checkpoint that has nothing but a manifest."""
    folder = root / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def client(uri: str):
    """A client of the store; imports mlflow late, because that takes seconds."""
    from pais_ray.tracking.mirror import connect

    return connect(uri)


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a metric, sorted."""
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, name))


def track_once(config: TrackingConfig, root: Path, status: Status | None = "FINISHED") -> None:
    """Mirror the directory once and close, as the driver does after training."""
    build_logger(config, root).close(status)


def tiny_run(data: Path, storage: Path, name: str, ap: float, *words: str) -> Path:
    """The directory of a finished run: a real checkpoint of an untrained nano Mask R-CNN at step 2, with a made-up
    AP."""
    from pais_ray.config.identity import flatten
    from pais_ray.config.tree import compose, run_schedule
    from pais_ray.runs import describe, directory
    from pais_ray.runs.checkpoints import checkpoint_folder
    from pais_ray.runs.prepare import prepare
    from pais_ray.train.state import build_state

    paths = (f"data.train={data}/train.json", f"data.val={data}/val.json", f"data.images={data}/images")
    run = (f"run.storage_path={storage}", f"run.name={name}", "data.image_size=64", "train.steps=2")
    config, facts = prepare(compose(["synthetic", "mask_rcnn", "supervised", *paths, *run, *words]))
    root, schedule = storage / name, run_schedule(config)
    directory.write_run_directory(root, config, facts, schedule)
    state = build_state(config, schedule, num_classes=len(facts.train.categories), device="cpu")
    state.step = 2
    state.note_score("teacher", 2, ap)
    state.save(checkpoint_folder(root, 2))
    write_row(root, 2, loss=1.0, **{"teacher/segm_AP": ap})
    tags = describe.tags(config, facts.manifest.split, facts.facts)
    open_run(config.tracking, storage, name, flatten(config), tags, datasets=facts.facts)
    track_once(config.tracking, root)
    return root
