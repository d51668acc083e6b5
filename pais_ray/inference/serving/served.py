"""The model that MLflow serves: from encoded images to COCO-like instances. MLflow runs this file to load a model.

The artifact is a run directory with one checkpoint: config.yaml, split.json and safetensors. Nothing is pickled, but
this file is code: load only models whose author you trust.
"""

import base64
import binascii
import contextlib
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property

from pais_ray.data.validation.rules import DataError
from pais_ray.inference.predictor import Predictor

INSTANCE = Object([
    Property("category_id", DataType.long),  # as in the training annotations
    Property("category", DataType.string),
    Property("bbox", Array(DataType.double)),  # x, y, width, height in px
    Property("score", DataType.double),
    Property("mask_iou", DataType.double),  # predicted
    Property("segmentation", Object([
        Property("size", Array(DataType.long)),  # height, width
        Property("counts", DataType.string),  # compressed RLE, as pycocotools decodes it
    ])),
])  # fmt: skip
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),  # JPEG, PNG, WebP and others; base64 in JSON
    outputs=Schema([
        ColSpec(DataType.long, "height"),
        ColSpec(DataType.long, "width"),
        ColSpec(Array(INSTANCE), "instances"),
    ]),
    params=ParamSchema([ParamSpec("score", DataType.double, 0.05)]),  # instances with a lower score are omitted
)  # fmt: skip


class Served(mlflow.pyfunc.PythonModel):
    """One role of one checkpoint with MLflow's interface ``predict``."""

    def load_context(self, context: Any) -> None:
        """Open the checkpoint of the artifact; called by MLflow."""
        role = context.model_config["role"]
        self.predictor = Predictor.open(Path(context.artifacts["run"]), role=role, checkpoint="last")

    def predict(self, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """One prediction per row of the column ``image``. Raises MlflowException (status 400) for an invalid image."""
        min_score = (params or {}).get("score", 0.0)
        return [self._predict_image(data, f"image {i}", min_score) for i, data in enumerate(model_input["image"])]

    def _predict_image(self, data: bytes, place: str, min_score: float) -> dict[str, Any]:
        with contextlib.suppress(binascii.Error):  # MLflow decodes base64 in `dataframe_*`, but not in `inputs`
            data = base64.b64decode(b"".join(data.split()), validate=True)
        try:
            picture, results = self.predictor.predict_bytes(data, place)
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        names = {c["id"]: c["name"] for c in self.predictor.categories}
        keys = ("category_id", "bbox", "score", "mask_iou", "segmentation")
        kept = [r for r in results if r["score"] >= min_score]
        instances = [{"category": names[r["category_id"]], **{key: r[key] for key in keys}} for r in kept]
        return {"height": picture.shape[0], "width": picture.shape[1], "instances": instances}


mlflow.models.set_model(Served())
