"""Check through a kubeconfig that a cluster has all that a run needs. Nothing is written."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from kubernetes import client
from kubernetes.utils.quantity import parse_quantity
from urllib3.exceptions import HTTPError

from pixelclip.commands.doctor import Finding, container_image
from pixelclip.commands.doctor import pipelines as kfp_health
from pixelclip_pipelines.cluster_config import Cluster, Step, image_of, node_rules, read
from pixelclip_pipelines.cluster_sections import Source
from pixelclip_pipelines.pods import core_api
from pixelclip_pipelines.submit import ENDPOINTS, Target
from pixelclip_pipelines.trainjob import GROUP, PLURAL, VERSION

_TIMEOUT = 10.0  # seconds per request
_SERVICE_ACCOUNT = "pipeline-runner"  # of KFP's default installation
_VERBS = ("create", "get", "delete")  # what the launcher does with TrainJobs
_SHOWN = 3


def run(target: Target) -> list[Finding]:
    """Run all checks and return the findings in printing order.

    Args:
        target: KFP, the settings of the cluster, and the number of training nodes.

    Raises:
        ValueError: the settings are invalid.
    """
    cluster = read(target.cluster)
    endpoint = target.endpoint or next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "") or cluster.endpoint
    findings = [kfp_health(endpoint), container_image(image_of(cluster, target.image))]
    api = core_api()
    if api is None:
        return [
            *findings,
            Finding("Kubernetes", "not configured", "no kubeconfig", "set KUBECONFIG to check the cluster itself"),
        ]
    namespace = cluster.namespace or "kubeflow"
    try:
        api.list_namespaced_pod(namespace, limit=1, _request_timeout=_TIMEOUT)
    except HTTPError as error:
        server = api.api_client.configuration.host
        return [*findings, Finding("Kubernetes", "failed", f"{server} cannot be reached: {_reason(error)}", "check KUBECONFIG")]
    except client.ApiException as error:
        if error.status == 401:
            return [*findings, Finding("Kubernetes", "failed", "login rejected (401)", "check KUBECONFIG")]
    return [*findings, *_checks(api, cluster, namespace, target.nodes)]


def _checks(api: client.CoreV1Api, cluster: Cluster, namespace: str, nodes: int) -> Iterator[Finding]:
    certificates = cluster.certificates
    bundle = [Source(name=certificates.source, env={"SSL_CERT_FILE": certificates.key})] if certificates.source else []
    for what, sources, find in (
        ("ConfigMap", [*cluster.config_maps, *(bundle if certificates.config_map else [])], api.read_namespaced_config_map),
        ("Secret", [*cluster.secrets, *(bundle if certificates.secret else [])], api.read_namespaced_secret),
    ):
        for source in _merged(sources):
            yield _source(what, source, namespace, find)
    for name in cluster.pull_secrets:
        yield _found(f"Secret {name}", partial(api.read_namespaced_secret, name, namespace, _request_timeout=_TIMEOUT))
    account = cluster.service_account or _SERVICE_ACCOUNT
    yield _found(
        f"service account {account}",
        lambda: api.read_namespaced_service_account(account, namespace, _request_timeout=_TIMEOUT),
    )
    if cluster.volume.claim:
        yield _claim(api, cluster.volume.claim, namespace)
    yield from _placement(api, cluster, nodes)
    if nodes > 1:
        yield from _trainer(cluster, namespace, account)


def _merged(sources: Iterable[Source]) -> list[tuple[str, dict[str, bool]]]:
    """Return every name with its keys, and whether each is optional; a file may list a name twice."""
    merged: dict[str, dict[str, bool]] = {}
    for source in sources:
        keys = merged.setdefault(source.name, {})
        keys.update({key: source.optional and keys.get(key, True) for key in source.env.values()})
    return list(merged.items())


def _source(what: str, source: tuple[str, dict[str, bool]], namespace: str, find: Callable[..., Any]) -> Finding:
    name, keys = source
    required = [key for key, optional in keys.items() if not optional]
    try:
        existing = set(find(name, namespace, _request_timeout=_TIMEOUT).data or {})
    except client.ApiException as error:
        if error.status == 404 and not required:
            return Finding(f"{what} {name}", "not configured", f"optional, not in namespace {namespace}")
        if error.status == 404:
            kind = "configmap" if what == "ConfigMap" else "secret generic"
            literals = " ".join(f"--from-literal={key}=..." for key in required)
            advice = f"kubectl -n {namespace} create {kind} {name} {literals}"
            return Finding(f"{what} {name}", "failed", f"not in namespace {namespace}; steps cannot start without it", advice)
        return _refused(f"{what} {name}", error)
    if missing := [key for key in required if key not in existing]:
        said = f"has no key {', '.join(missing)}; steps cannot start without it"
        return Finding(f"{what} {name}", "failed", said, f"its keys are {', '.join(sorted(existing)) or 'none'}")
    absent = [key for key in keys if key not in existing]
    but = f" but the optional {', '.join(absent)}" if absent else ""
    return Finding(f"{what} {name}", "ok", f"has all keys{but}")


def _found(what: str, find: Callable[[], Any], advice: str = "") -> Finding:
    try:
        find()
    except client.ApiException as error:
        if error.status == 404:
            return Finding(what, "failed", "does not exist", advice)
        return _refused(what, error)
    return Finding(what, "ok", "exists")


def _refused(what: str, error: client.ApiException) -> Finding:
    return Finding(what, "missing", f"not checked: {error.status} {error.reason}", "ask for the right to read it")


def _claim(api: client.CoreV1Api, name: str, namespace: str) -> Finding:
    what = f"claim {name}"
    try:
        claim = api.read_namespaced_persistent_volume_claim(name, namespace, _request_timeout=_TIMEOUT)
    except client.ApiException as error:
        if error.status == 404:
            return Finding(what, "failed", f"not in namespace {namespace}", "create it, see docs/cluster.md")
        return _refused(what, error)
    modes, phase = claim.spec.access_modes or [], claim.status.phase
    if "ReadWriteMany" not in modes:
        return Finding(what, "failed", f"access modes {', '.join(modes)}", "steps on several nodes need ReadWriteMany")
    if phase == "Lost":
        return Finding(what, "failed", "its volume is lost", "restore the volume or create another claim")
    return Finding(what, "ok", f"{phase}, {', '.join(modes)}")


def _placement(api: client.CoreV1Api, cluster: Cluster, nodes: int) -> Iterator[Finding]:
    """Check that a node exists for every step, one finding per kind of pod."""
    try:
        existing = api.list_node(_request_timeout=_TIMEOUT).items
    except client.ApiException as error:
        yield _refused("nodes", error)
        return
    kinds: dict[str, tuple[Step, list[str]]] = {}
    for name, step in cluster.steps.items():
        if (name == "train_job") > (nodes > 1):
            continue
        rules = node_rules(cluster, step)[0]
        key = str((step.gpus, step.gpu_type, step.cpu, step.memory, step.node_selector, rules, step.pod_tolerations))
        kinds.setdefault(key, (step, []))[1].append(name)
    for step, names in kinds.values():
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        wanted = nodes if "train" in names else 1
        yield _nodes_for(step, node_rules(cluster, step)[0], existing, f"nodes for {shown}", wanted)


def _nodes_for(step: Step, rules: list[dict[str, Any]], existing: list[Any], what: str, wanted: int) -> Finding:
    """Find the nodes for a step by each of its conditions in turn, so that the first one without a node is named."""
    requests = {"cpu": step.cpu, "memory": step.memory} | ({step.gpu_type: str(step.gpus)} if step.gpus else {})
    left = [node for node in existing if not node.spec.unschedulable]
    conditions: list[tuple[str, Callable[[Any], bool]]] = [
        (
            f"the labels {step.node_selector}",
            lambda node: all((node.metadata.labels or {}).get(key) == value for key, value in step.node_selector.items()),
        ),
        *((f"the node_affinity {rule}", lambda node, rule=rule: _matches(rule, node.metadata.labels or {})) for rule in rules),
        *(
            (f"{amount} {name}", lambda node, name=name, amount=amount: _amount(node, name) >= parse_quantity(amount))
            for name, amount in reversed(requests.items())
        ),
    ]
    for said, holds in conditions:
        fitting = [node for node in left if holds(node)]
        if not fitting:
            return Finding(
                what,
                "failed",
                f"no node{' of those left' if len(left) < len(existing) else ''} has {said}",
                _most(left, requests),
            )
        left = fitting
    tolerated = [node for node in left if not _untolerated(step, node)]
    if not tolerated:
        taints = sorted({taint for node in left for taint in _untolerated(step, node)})
        advice = "add tolerations to the step in cluster.yaml"
        return Finding(what, "failed", f"{len(left)} nodes would fit, but for their taints {', '.join(taints)}", advice)
    amount = ", ".join(f"{amount} {name}" for name, amount in requests.items())
    if len(tolerated) < wanted:
        return Finding(what, "failed", f"{len(tolerated)} nodes have {amount}, --nodes {wanted} needs {wanted}")
    return Finding(what, "ok", f"{len(tolerated)} of {len(existing)} have {amount}")


def _matches(rule: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether the labels of a node fulfil a matchExpression of Kubernetes."""
    value, wanted = labels.get(rule["key"]), rule.get("values", [])
    match rule["operator"]:
        case "In":
            return value in wanted
        case "NotIn":  # also without the label
            return value not in wanted
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    if value is None or not value.lstrip("-").isdecimal():
        return False
    return int(value) > int(wanted[0]) if rule["operator"] == "Gt" else int(value) < int(wanted[0])


def _amount(node: Any, name: str) -> Any:
    return parse_quantity((node.status.allocatable or {}).get(name, "0"))


def _most(nodes: list[Any], requests: Mapping[str, str]) -> str:
    most = {name: max((_amount(node, name) for node in nodes), default=0) for name in requests}
    return "the most that a node has: " + ", ".join(f"{_readable(name, amount)} {name}" for name, amount in most.items())


def _readable(name: str, amount: Any) -> str:
    return f"{float(amount) / (1 << 30):.0f}Gi" if name == "memory" else f"{float(amount):g}"


def _untolerated(step: Step, node: Any) -> list[str]:
    """Return the taints of a node that keep the pod of a step away."""
    kept = []
    for taint in node.spec.taints or []:
        if taint.effect == "PreferNoSchedule":
            continue
        tolerated = any(
            each.get("effect", taint.effect) == taint.effect
            and (
                (each.get("operator") == "Equal" and (each["key"], each["value"]) == (taint.key, taint.value))
                or (each.get("operator") != "Equal" and each.get("key", taint.key) == taint.key)
            )
            for each in step.pod_tolerations
        )
        if not tolerated:
            kept.append(f"{taint.key}{f'={taint.value}' if taint.value else ''}:{taint.effect}")
    return kept


def _trainer(cluster: Cluster, namespace: str, account: str) -> Iterator[Finding]:
    """Check what --nodes needs: TrainJob's CRD, its runtime, and the rights of the service account."""
    custom, runtime = client.CustomObjectsApi(), cluster.trainer.runtime
    try:
        resources = custom.get_api_resources(GROUP, VERSION, _request_timeout=_TIMEOUT).resources
        known = any(each.name == PLURAL for each in resources)
    except client.ApiException as error:
        if error.status != 404:
            yield _refused("TrainJob", error)
            return
        known = False
    if not known:
        yield Finding("TrainJob", "failed", f"{PLURAL}.{GROUP} is not installed", "install Kubeflow Trainer 2.2 or newer")
        return
    yield Finding("TrainJob", "ok", f"{PLURAL}.{GROUP}/{VERSION} is installed")
    yield _found(
        f"runtime {runtime}",
        lambda: custom.get_cluster_custom_object(GROUP, VERSION, "clustertrainingruntimes", runtime, _request_timeout=_TIMEOUT),
        "trainer.runtime in cluster.yaml",
    )
    what, denied = f"rights of {account}", []
    for verb in _VERBS:
        attributes = client.V1ResourceAttributes(group=GROUP, resource=PLURAL, verb=verb, namespace=namespace)
        user = f"system:serviceaccount:{namespace}:{account}"
        review = client.V1SubjectAccessReview(spec=client.V1SubjectAccessReviewSpec(resource_attributes=attributes, user=user))
        try:
            answer = client.AuthorizationV1Api().create_subject_access_review(review, _request_timeout=_TIMEOUT)
        except client.ApiException as error:
            yield _refused(what, error)
            return
        if not answer.status.allowed:
            denied.append(verb)
    if denied:
        advice = "kubectl apply -k examples/cluster/overlays/multi-node, see docs/cluster.md, section 8"
        yield Finding(what, "failed", f"may not {', '.join(denied)} TrainJobs", advice)
    else:
        yield Finding(what, "ok", f"may {', '.join(_VERBS)} TrainJobs")


def _reason(error: HTTPError) -> str:
    return " ".join(str(getattr(error, "reason", error)).split())[:200]
