"""The Kubeflow pipeline: its DAG, compilation and runners."""
