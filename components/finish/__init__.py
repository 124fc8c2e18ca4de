"""KFP component that ends the MLflow run."""
