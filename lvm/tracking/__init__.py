"""All of MLflow: runs, datasets, logged models, versions, the alias."""
