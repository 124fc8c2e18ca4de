"""MLflow's model registry: the gate, promotion, model versions and their lineage."""
