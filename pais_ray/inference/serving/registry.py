"""MLflow's model registry: checkpoints as versions that can be served, and the promotion of a version to champion.

A version is a reduced run directory: config.yaml, split.json and the weights of one role. It is stored in the logged
model that the tracker created for the checkpoint; the scores and tags of that model decide whether two versions are
comparable.
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
from pais_ray.tracking import tracker
from pais_ray.tracking.mirror import connect
from pais_ray.tracking.mlflow_compat import EXTERNAL_MODEL_TAG, is_not_found
from pais_ray.tracking.record import read_run_id, redact_secrets
from pais_ray.tracking.settings import TrackingConfig, tracking_uri

CHAMPION, CANDIDATE = "champion", "candidate"
# Versions are comparable only if these tags agree: tag -> what it identifies.
COMPARABLE = {"split_sha256": "labeled images", "val_sha256": "validation annotations"}
REQUIREMENTS = ("pais-ray", "mlflow", "torch", "torchvision", "ray")  # for serving; pinned to the installed versions


class PromotionRefusedError(ValueError):
    """The version must not become the champion."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a registered model, with the score and tags that promotion depends on."""

    name: str
    version: str
    role: str
    step: int
    ap: float  # segm AP of the role on the validation images
    tags: dict[str, str]  # of the logged model

    def __str__(self) -> str:
        return f"{self.name} version {self.version} ({self.role} of step {self.step}, segm AP {self.ap:.4f})"


def register(root: Path, name: str, *, role: str = "teacher", checkpoint: str = "best") -> Version:
    """Register a checkpoint of the run at ``root`` as a version of the model ``name`` with the alias ``candidate``.

    Registering the same checkpoint again gives the same version. Raises ValueError if the checkpoint is damaged or was
    not evaluated, and the errors of the MLflow client.
    """
    config = load(root / "config.yaml")
    folder = choose_checkpoint(root, role, checkpoint)
    verify(folder)
    uri = tracking_uri(config.tracking, root.parent)
    tracker.sync(config.tracking, root)
    client = connect(uri)
    mlflow.set_tracking_uri(uri)  # with a database, models:/ URIs are resolved at this URI, not at the client's
    run = client.get_run(read_run_id(root))
    model = _find_logged_model(client, run, folder, role)
    source = f"models:/{model.model_id}"
    versions = [v for v in _versions(client, name) if v.source == source]
    if not versions:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = _write_bundle(root, folder, role, Path(scratch) / "run")
            packed = Path(scratch) / "model"
            _save_model(bundle, role, packed, Model(run_id=run.info.run_id, model_id=model.model_id))
            client.log_model_artifacts(model.model_id, str(packed))
        if EXTERNAL_MODEL_TAG in model.tags:
            client.delete_logged_model_tag(model.model_id, EXTERNAL_MODEL_TAG)
        if not _exists(client, name):
            client.create_registered_model(name)
        tags = {key: model.tags[key] for key in ("role", "step", *COMPARABLE) if key in model.tags}
        versions = [client.create_model_version(name, source, run.info.run_id, tags=tags, model_id=model.model_id)]
    client.set_registered_model_alias(name, CANDIDATE, versions[-1].version)
    return _read_version(client, versions[-1])


def promote(uri: str, name: str, number: str | None = None) -> tuple[Version, Version | None]:
    """Make a version of ``name``, by default the candidate, its champion; return it and the previous champion.

    Raises PromotionRefusedError if the champion is better or the two are not comparable, ValueError if there is no such
    version, and the errors of the MLflow client.
    """
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.exists():  # MLflow would create an empty database
        raise ValueError(f"{file}: expected the database of a registry, got no such file; give its URI with --tracking")
    client = connect(uri)
    if not _exists(client, name):
        place = redact_secrets(uri)
        raise ValueError(
            f"{name}: expected a registered model, got none in {place}; create it with `pais-ray register`"
        )
    found = _by_alias(client, name, CANDIDATE) if number is None else _by_number(client, name, number)
    if found is None:
        numbers = ", ".join(str(v.version) for v in _versions(client, name)) or "none"
        raise ValueError(f"{name}: expected an existing version, got {number or CANDIDATE}; versions: {numbers}")
    candidate, champion = _read_version(client, found), _by_alias(client, name, CHAMPION)
    previous = None if champion is None else _read_version(client, champion)
    if previous is not None:
        check_promotion(candidate, previous)
    client.set_registered_model_alias(name, CHAMPION, candidate.version)
    return candidate, previous


def check_promotion(candidate: Version, champion: Version) -> None:
    """Raise PromotionRefusedError unless the candidate is at least as good with the same labels and validation data."""
    for tag, what in COMPARABLE.items():
        ours, theirs = candidate.tags.get(tag, "unknown"), champion.tags.get(tag, "unknown")
        if ours != theirs or ours == "unknown":
            raise PromotionRefusedError(
                f"{candidate} and the champion, {champion}, have different {what} ({ours[:8]} and {theirs[:8]}), so "
                "their scores are not comparable; register it under another name, or train it on the same data"
            )
    if not candidate.ap >= champion.ap:
        raise PromotionRefusedError(
            f"{candidate} is worse than the champion, {champion}: {candidate.ap - champion.ap:+.4f} on the same "
            "validation images; promote a version that is at least as good"
        )


def _find_logged_model(client: Any, run: Any, folder: Path, role: str) -> Any:
    """The logged model that the tracker created for this checkpoint. Raises ValueError if there is none."""
    name = f"{role}-{folder.name.removeprefix('step_')}"
    query = f"name = '{name}' AND source_run_id = '{run.info.run_id}'"
    found = client.search_logged_models([run.info.experiment_id], query)
    if not found:
        raise ValueError(
            f"{folder}: expected an evaluated checkpoint, got no AP of its {role}; evaluate during training "
            "(train.eval_every), or register an evaluated checkpoint, such as --checkpoint best"
        )
    return found[0]


def _write_bundle(root: Path, folder: Path, role: str, out: Path) -> Path:
    """Write a run directory with only what prediction requires, without the address of a tracking server."""
    config = load(root / "config.yaml")
    target = out / "checkpoints" / folder.name
    target.mkdir(parents=True)
    (out / "config.yaml").write_text(dump(config.model_copy(update={"tracking": TrackingConfig()})))
    shutil.copy(root / "split.json", out / "split.json")
    weights = f"{role}.safetensors"
    shutil.copy(folder / weights, target / weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {weights: manifest["files"][weights]}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return out


def _save_model(bundle: Path, role: str, out: Path, description: Model) -> None:
    """Write the bundle as an MLflow model: code from served.py, weights unchanged."""
    mlflow.pyfunc.save_model(
        out,
        mlflow_model=description,
        python_model=served.__file__,
        artifacts={"run": str(bundle)},
        model_config={"role": role},
        signature=served.SIGNATURE,
        input_example=({"image": [_example_image()]}, {"score": 0.05}),
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in REQUIREMENTS],
    )


def _example_image() -> bytes:
    """An example of the content of the input column."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(file, format="PNG")
    return file.getvalue()


def _read_version(client: Any, found: Any) -> Version:
    """The version with the score of its logged model. Raises ValueError if it has none."""
    model = client.get_logged_model(found.source.removeprefix("models:/"))
    role = model.tags["role"]
    scores = [m for m in model.metrics if m.key == f"{role}/segm_AP"]
    if not scores:
        place = f"{found.name} version {found.version}"
        raise ValueError(f"{place}: expected a segm AP, got none; create versions with `pais-ray register`")
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
