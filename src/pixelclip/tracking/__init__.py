"""Runs in MLflow, with a journal that survives an outage of its server."""
