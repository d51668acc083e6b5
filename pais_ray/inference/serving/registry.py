"""MLflow's model registry: a checkpoint as a version that can be served, and which version is the champion.

A version is a run directory in small: config.yaml, split.json and one role's weights. It is put into the logged
model that the tracker made of the checkpoint, whose scores and tags say whether two versions can be compared.
"""

import io
import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from PIL import Image

from pais_ray.config.tree import dump, load
from pais_ray.inference.predictor import choose_checkpoint
from pais_ray.inference.serving import served
from pais_ray.runs.checkpoints import verify
from pais_ray.tracking import record, tracker
from pais_ray.tracking.mirror import connect
from pais_ray.tracking.mlflow_compat import EXTERNAL_MODEL_TAG, is_not_found
from pais_ray.tracking.record import read_run_id
from pais_ray.tracking.settings import TrackingConfig, tracking_uri

CHAMPION, CANDIDATE = "champion", "candidate"
SAME = {"split_sha256": "labeled images", "val_sha256": "validation annotations"}  # else figures say nothing
NEEDED = ("pais-ray", "mlflow", "torch", "torchvision", "ray")  # to serve; recorded with the versions that are here


class Refused(ValueError):
    """A promotion that the rule forbids, with figures and remedy."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a registered model, with what it is judged by."""

    name: str
    version: str
    role: str
    step: int
    ap: float  # segm AP of the role on the validation set
    tags: dict[str, str]  # of the logged model

    def __str__(self) -> str:
        return f"{self.name} version {self.version} ({self.role} of step {self.step}, segm AP {self.ap:.4f})"


def register(root: Path, name: str, *, role: str = "teacher", checkpoint: str = "best") -> Version:
    """Makes a checkpoint of the run at ``root`` a version of the model ``name``, with the alias ``candidate``.

    The same checkpoint twice is one version. Raises ValueError, and what MLflow raises.
    """
    config = load(root / "config.yaml")
    folder = choose_checkpoint(root, role, checkpoint)
    verify(folder)
    uri = tracking_uri(config.tracking, root.parent)
    tracker.sync(config.tracking, root)
    client = connect(uri)
    mlflow.set_tracking_uri(uri)  # a database's registry looks for models:/ at the process's URI, not the client's
    run = client.get_run(read_run_id(root))
    model = _scored(client, run, folder, role)
    source = f"models:/{model.model_id}"
    known = [v for v in _versions(client, name) if v.source == source]
    if not known:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = _bundle(root, folder, role, Path(scratch) / "run")
            packed = Path(scratch) / "model"
            _pack(bundle, role, packed, Model(run_id=run.info.run_id, model_id=model.model_id))
            client.log_model_artifacts(model.model_id, str(packed))
        if EXTERNAL_MODEL_TAG in model.tags:
            client.delete_logged_model_tag(model.model_id, EXTERNAL_MODEL_TAG)
        if not _exists(client, name):
            client.create_registered_model(name)
        tags = {key: model.tags[key] for key in ("role", "step", *SAME) if key in model.tags}
        known = [client.create_model_version(name, source, run.info.run_id, tags=tags, model_id=model.model_id)]
    client.set_registered_model_alias(name, CANDIDATE, known[-1].version)
    return _judged(client, known[-1])


def promote(uri: str, name: str, number: str | None = None) -> tuple[Version, Version | None]:
    """Makes a version of ``name`` (default: the candidate) its champion; returns it and the one before, if any.

    Raises Refused where the champion is better or the two cannot be compared, ValueError where there is no such
    version, and what MLflow raises.
    """
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.exists():  # MLflow would make an empty one
        raise ValueError(f"{file}: expected the database of a registry, got no file; say where it is with --tracking")
    client = connect(uri)
    if not _exists(client, name):
        raise ValueError(f"{name}: no such model in {record.redact_secrets(uri)}; make it with `pais-ray register`")
    found = _by_alias(client, name, CANDIDATE) if number is None else _by_number(client, name, number)
    if found is None:
        numbers = ", ".join(str(v.version) for v in _versions(client, name)) or "none"
        raise ValueError(f"{name}: no version {number or CANDIDATE}; there are {numbers}")
    candidate, champion = _judged(client, found), _by_alias(client, name, CHAMPION)
    before = None if champion is None else _judged(client, champion)
    if before is not None:
        check(candidate, before)
    client.set_registered_model_alias(name, CHAMPION, candidate.version)
    return candidate, before


def check(candidate: Version, champion: Version) -> None:
    """Raises Refused unless the candidate is at least as good on the same data, learned from the same labels."""
    for tag, what in SAME.items():
        ours, theirs = candidate.tags.get(tag, "unknown"), champion.tags.get(tag, "unknown")
        if ours != theirs or ours == "unknown":
            raise Refused(
                f"{candidate} and the champion, {champion}, have other {what} ({ours[:8]} and {theirs[:8]}): their "
                "figures do not say which is better. Register it under a name of its own, or train it on the same data"
            )
    if not candidate.ap >= champion.ap:
        raise Refused(
            f"{candidate} is worse than the champion, {champion}: {candidate.ap - champion.ap:+.4f} on the same "
            "validation images. The champion stays; promote a version that is at least as good"
        )


def _scored(client: Any, run: Any, folder: Path, role: str) -> Any:
    """The logged model that the tracker made of this checkpoint."""
    name = f"{role}-{folder.name.removeprefix('step_')}"
    query = f"name = '{name}' AND source_run_id = '{run.info.run_id}'"
    found = client.search_logged_models([run.info.experiment_id], query)
    if not found:
        raise ValueError(
            f"{folder}: no AP of its {role} is known; evaluate while training (train.eval_every) and "
            "register a checkpoint that was evaluated, as --checkpoint best is"
        )
    return found[0]


def _bundle(root: Path, folder: Path, role: str, out: Path) -> Path:
    """A run directory with nothing but what predicting needs, and no address of a tracking server."""
    config = load(root / "config.yaml")
    inside = out / "checkpoints" / folder.name
    inside.mkdir(parents=True)
    (out / "config.yaml").write_text(dump(config.model_copy(update={"tracking": TrackingConfig()})))
    shutil.copy(root / "split.json", out / "split.json")
    weights = f"{role}.safetensors"
    shutil.copy(folder / weights, inside / weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {weights: manifest["files"][weights]}
    (inside / "manifest.json").write_text(json.dumps(manifest))
    return out


def _pack(bundle: Path, role: str, out: Path, about: Model) -> None:
    """The bundle as an MLflow model: code from served.py, weights as they are."""
    mlflow.pyfunc.save_model(
        out,
        mlflow_model=about,
        python_model=served.__file__,
        artifacts={"run": str(bundle)},
        model_config={"role": role},
        signature=served.SIGNATURE,
        input_example=({"image": [_example()]}, {"score": 0.05}),
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in NEEDED],
    )


def _example() -> bytes:
    """A picture to show what the column holds."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(file, format="PNG")
    return file.getvalue()


def _judged(client: Any, found: Any) -> Version:
    """The version with its scores, as the logged model behind it has them."""
    model = client.get_logged_model(found.source.removeprefix("models:/"))
    role = model.tags["role"]
    scores = [m for m in model.metrics if m.key == f"{role}/segm_AP"]
    if not scores:
        raise ValueError(f"{found.name} version {found.version}: no segm AP is known; make it with `pais-ray register`")
    ap = max(scores, key=lambda m: m.timestamp).value
    return Version(
        name=found.name, version=str(found.version), role=role, step=int(model.tags["step"]), ap=ap, tags=model.tags
    )


def _versions(client: Any, name: str) -> list[Any]:
    return sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))


def _by_number(client: Any, name: str, number: str) -> Any:
    return next((v for v in _versions(client, name) if str(v.version) == number), None)


def _by_alias(client: Any, name: str, alias: str) -> Any:
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else _by_number(client, name, str(number))


def _exists(client: Any, name: str) -> bool:
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if not is_not_found(error):
            raise
        return False
    return True
