"""The error of a request that cannot be answered, which the scoring server makes a 400."""

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from lvm.system.errors import one_line


class Refusal(MlflowException, ValueError):
    """A ValueError to callers in the same process; over HTTP its reason, without a traceback.

    MLflow's server adds the traceback to the answer for every error but its own.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason), error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """Return the body of the answer: the server has put a print of the data into `message`."""
        self.message = str(self)
        return str(super().serialize_as_json())
