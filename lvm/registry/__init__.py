"""The registered model `lvm` in MLflow: versions, alias, settlements."""
