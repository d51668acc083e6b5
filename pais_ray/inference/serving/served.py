"""The model that MLflow serves: encoded images in, COCO-like instances out. MLflow runs this file when it loads one.

What lies beside it is a run directory with one checkpoint: config.yaml, split.json, safetensors. Nothing is pickled,
but this file is code: load only models whose author you trust.
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
        Property("counts", DataType.string),  # compressed run lengths, as pycocotools decodes them
    ])),
])  # fmt: skip
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),  # JPEG, PNG, WebP ...; base64 in JSON
    outputs=Schema([
        ColSpec(DataType.long, "height"),
        ColSpec(DataType.long, "width"),
        ColSpec(Array(INSTANCE), "instances"),
    ]),
    params=ParamSchema([ParamSpec("score", DataType.double, 0.05)]),  # instances below it are left out
)  # fmt: skip


class Served(mlflow.pyfunc.PythonModel):
    """One role of one checkpoint behind MLflow's ``predict``."""

    def load_context(self, context: Any) -> None:
        role = context.model_config["role"]
        self.predictor = Predictor.open(Path(context.artifacts["run"]), role=role, checkpoint="last")

    def predict(self, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """One answer for each row of the column ``image``."""
        least = (params or {}).get("score", 0.0)
        return [self._answer(data, f"image {i}", least) for i, data in enumerate(model_input["image"])]

    def _answer(self, data: bytes, where: str, least: float) -> dict[str, Any]:
        with contextlib.suppress(binascii.Error):  # MLflow decodes the base64 of `dataframe_*`, not that of `inputs`
            data = base64.b64decode(b"".join(data.split()), validate=True)
        try:
            picture, results = self.predictor.predict_bytes(data, where)
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        names = {c["id"]: c["name"] for c in self.predictor.categories}
        keys = ("category_id", "bbox", "score", "mask_iou", "segmentation")
        kept = [r for r in results if r["score"] >= least]
        instances = [{"category": names[r["category_id"]], **{key: r[key] for key in keys}} for r in kept]
        return {"height": picture.shape[0], "width": picture.shape[1], "instances": instances}


mlflow.models.set_model(Served())
