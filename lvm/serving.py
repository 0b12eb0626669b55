"""The served predictor: MLflow runs this file to load a logged model.

Shapes: B batch, T time, D vector dim.
"""

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray

from lvm.checkpoint import load_model, read_config
from lvm.contexts import check_contexts
from lvm.prediction import predict_contexts


class ServedPredictor(PythonModel):
    """Maps contexts (B, T, D) float32 to predicted unit vectors (B, D) float32."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights that were logged with the model."""
        folder = Path(context.artifacts["config"]).parent
        self.model = load_model(folder)
        self.dim = int(read_config(folder)["dim"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> NDArray[np.float32]:
        """Return the predicted next vectors (B, D), unit length, for contexts (B, T, D).

        Raises ValueError on an empty batch or context, another D, zero or non-finite vectors.
        """
        contexts_BTD = np.asarray(model_input, dtype=np.float32)
        check_contexts(contexts_BTD, self.dim)
        unit_BTD = contexts_BTD / np.linalg.norm(contexts_BTD, axis=-1, keepdims=True)
        return predict_contexts(self.model, unit_BTD)


set_model(ServedPredictor())
