"""The code that is logged with every model; the installed lvm serves it."""

from mlflow.models import set_model

from lvm.serving.predictor import ServedPredictor

set_model(ServedPredictor())
