"""MLflow runs, with a journal that survives server outages."""
