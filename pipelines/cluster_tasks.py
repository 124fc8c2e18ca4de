"""Apply the settings of a cluster to the tasks of a pipeline at compile time."""

from importlib.metadata import version
from typing import Any

from kfp import dsl, kubernetes

from pixelclip.tracking.run import PIPELINE_RUN
from pixelclip_pipelines.cluster_config import Cluster, Step, node_rules, pod_environment, pod_labels
from pixelclip_pipelines.cluster_sections import seconds

RUN_LABEL = "metadata.labels['pipeline/runid']"
"""Label of every pod with the ID of the KFP run."""
_EXECUTOR, _SUPERVISOR = "python3 -m kfp.dsl.executor_main", "python3 -m pixelclip_pipelines.supervisor"


def place_on(task: dsl.PipelineTask, cluster: Cluster, name: str, image: str) -> dsl.PipelineTask:
    """Set image, resources, placement, retries, secrets, network, security and volumes of a task.

    Args:
        task: a task of a pipeline that is being compiled.
        cluster: settings of the cluster.
        name: name of the step in `cluster.steps`.
        image: container image of the step.

    Returns:
        The task.
    """
    step = cluster.steps[name]
    task.set_container_image(image)
    for variable, value in pod_environment(cluster, step, image).items():
        task.set_env_variable(variable, value)
    task.set_cpu_request(step.cpu).set_cpu_limit(step.cpu_limit)
    task.set_memory_request(step.memory).set_memory_limit(step.memory_limit)
    if step.gpus:
        task.set_accelerator_type(step.gpu_type).set_accelerator_limit(step.gpus)
    if step.shared_memory:
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit=step.shared_memory)
    _choose_nodes(task, cluster, step)
    kubernetes.set_timeout(task, seconds(step.timeout))
    # backoff_max_duration limits all attempts together, counted from the start of the first, not a single delay.
    # This repeats only lost pods: KFP 2.17 sets Argo's retryPolicy to OnError. The supervisor repeats failed containers.
    _supervise(task, name, step)
    task.set_retry(step.retries, f"{seconds(step.backoff)}s", step.backoff_factor, f"{step.total_seconds}s")
    # A cached result would be wrong: KFP identifies input folders by address instead of content, and training and registering
    # change MLflow. Finished results are reused in the workspace.
    task.set_caching_options(False)
    _give_secrets(task, cluster)
    if cluster.volume.claim:  # KFP itself mounts a run's own volume, in steps with a parameter that contains its path
        kubernetes.mount_pvc(task, cluster.volume.claim, cluster.volume.mount)
    if cluster.pull_policy:
        kubernetes.set_image_pull_policy(task, cluster.pull_policy)
    if cluster.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.pull_secrets))
    for key, value in pod_labels(cluster).items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in cluster.pods.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)
    if cluster.pods.restricted:
        _restrict(task, cluster)
    return task


def _choose_nodes(task: dsl.PipelineTask, cluster: Cluster, step: Step) -> None:
    for key, value in step.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in step.pod_tolerations:
        kubernetes.add_toleration(task, **toleration)
    required, preferred = node_rules(cluster, step)
    if required:  # in one call: of several required terms Kubernetes asks for only one
        kubernetes.add_node_affinity(task, match_expressions=required)
    for weight, expression in preferred:
        kubernetes.add_node_affinity(task, match_expressions=[expression], weight=weight)


def _give_secrets(task: dsl.PipelineTask, cluster: Cluster) -> None:
    """Set the variables from Secrets and ConfigMaps, and mount the certificates."""
    for secret in cluster.secrets:
        for variables in _by_key(secret.env):
            kubernetes.use_secret_as_env(task, secret.name, variables, secret.optional)
    for config in cluster.config_maps:
        for variables in _by_key(config.env):
            kubernetes.use_config_map_as_env(task, config.name, variables, config.optional)
    certificates = cluster.certificates
    if certificates.config_map:
        kubernetes.use_config_map_as_volume(task, certificates.config_map, certificates.mount)
    if certificates.secret:
        kubernetes.use_secret_as_volume(task, certificates.secret, certificates.mount)


def _restrict(task: dsl.PipelineTask, cluster: Cluster) -> None:
    """Run a task without root and without writing to the image.

    KFP itself forbids privilege escalation, drops all capabilities and sets the seccomp profile RuntimeDefault. kfp-kubernetes
    has no function for readOnlyRootFilesystem; an administrator can set it, since nothing is written outside these volumes.
    """
    pods = cluster.pods
    kubernetes.set_security_context(task, run_as_user=pods.user, run_as_group=pods.group, run_as_non_root=True)
    for name, path, limit in pods.scratch:
        kubernetes.empty_dir_mount(task, name, path, size_limit=limit or None)


def _by_key(env: dict[str, str]) -> list[dict[str, str]]:
    """Turn `{variable: key}` into `{key: variable}`, several of them if variables share a key."""
    maps: list[dict[str, str]] = []
    for variable, key in env.items():
        free = next((each for each in maps if key not in each), None)
        if free is None:
            maps.append(free := {})
        free[key] = variable
    return maps


def _supervise(task: dsl.PipelineTask, name: str, step: Step) -> None:
    """Start a task's executor by `pixelclip_pipelines.supervisor`.

    Raises:
        ValueError: this version of kfp starts its executor in another way.
    """
    options = f"--step {name} --retries {step.retries} --backoff {seconds(step.backoff)} --backoff-factor {step.backoff_factor}"
    changed = [part.replace(_EXECUTOR, f"{_SUPERVISOR} {options}") for part in task.container_spec.command]
    if changed == task.container_spec.command:
        raise ValueError(f"kfp {version('kfp')} starts steps in a way that pixelclip does not support; see requirements.txt")
    task.container_spec.command = changed


def run_config(cluster: Cluster | None) -> dsl.PipelineConfig | None:
    """Return time limit, deletion and own volume of a run, or None if the cluster sets none of them."""
    if cluster is None:
        return None
    volume, limits = cluster.volume, cluster.run
    times = {
        "active_deadline_seconds": limits.deadline,
        "ttl_seconds_after_success": limits.ttl_success,
        "ttl_seconds_after_failure": limits.ttl_failure,
    }
    chosen: dict[str, Any] = {name: seconds(duration) for name, duration in times.items() if duration}
    if volume.size:
        claim = {"accessModes": [volume.access_mode]} | (
            {"storageClassName": volume.storage_class} if volume.storage_class else {}
        )
        chosen["workspace"] = dsl.WorkspaceConfig(volume.size, dsl.KubernetesWorkspaceConfig(pvcSpecPatch=claim))
    return dsl.PipelineConfig(**chosen) if chosen else None


def set_run_id(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Pass the ID of the KFP run to a task, by which steps find their common MLflow run."""
    return kubernetes.use_field_path_as_env(task, PIPELINE_RUN, RUN_LABEL)
