"""The fields of KServe's InferenceService, as far as our manifests use them."""

import kubernetes_validate

# `ComponentExtensionSpec` in kserve's pkg/apis/serving/v1beta1/component.go; the other fields of a predictor are a PodSpec's.
EXTENSION = {
    "minReplicas": int,
    "maxReplicas": int,
    "scaleTarget": int,
    "scaleMetric": str,
    "containerConcurrency": int,
    "timeout": int,
    "canaryTrafficPercent": int,
    "logger": dict,
    "batcher": dict,
    "labels": dict,
    "annotations": dict,
    "deploymentStrategy": dict,
}


def check(document: dict) -> dict:
    """Check an InferenceService with a custom predictor; return the predictor's pod spec."""
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert set(document["spec"]) == {"predictor"}
    predictor = document["spec"]["predictor"]
    extension = {name: value for name, value in predictor.items() if name in EXTENSION}
    assert all(isinstance(value, EXTENSION[name]) for name, value in extension.items())
    spec = {name: value for name, value in predictor.items() if name not in EXTENSION}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": document["metadata"], "spec": spec}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    return spec
