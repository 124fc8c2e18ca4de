"""The Kubeflow pipeline: the DAG, and how it is compiled and run."""
