"""What people see of a project in MLflow's own pages, by a real browser."""
