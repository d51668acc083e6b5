"""A run directory as `pais-ray train` leaves it, of a network that was not trained."""

from pathlib import Path

from pais_ray.config.tree import compose, run_schedule
from pais_ray.runs.checkpoints import checkpoint_folder
from pais_ray.runs.directory import write_run_directory
from pais_ray.runs.prepare import prepare
from pais_ray.train.state import build_state


def untrained_run(data: Path, storage: Path, name: str = "untrained", *more: str) -> Path:
    """Write the run directory. ``data`` is the folder of the fixture tiny_coco; a quarter of its images are labeled."""
    words = [
        *("synthetic", "mask_rcnn", "pais", "data.image_size=64", "data.labeled=0.25", "segmentor.weights=null"),
        *(f"data.train={data}/train.json", f"data.val={data}/val.json", f"data.images={data}/images"),
        *("method.tau_cls=0.1", "method.tau_iou=0", f"run.storage_path={storage}", f"run.name={name}"),
    ]
    config, prepared = prepare(compose([*words, *more]))
    schedule = run_schedule(config)
    write_run_directory(storage / name, config, prepared, schedule)
    state = build_state(config, schedule, len(prepared.train.categories), "cpu")
    state.step = 1
    state.save(checkpoint_folder(storage / name, 1))
    return storage / name
