"""Apply the settings of a cluster to the tasks of a pipeline at compile time."""

from importlib.metadata import version

from kfp import dsl, kubernetes

from pixelclip.tracking.run import PIPELINE_RUN
from pixelclip_pipelines.cluster_config import Cluster, Step, pod_environment, seconds

RUN_LABEL = "metadata.labels['pipeline/runid']"
"""Label of every pod with the ID of the KFP run."""
_EXECUTOR, _SUPERVISOR = "python3 -m kfp.dsl.executor_main", "python3 -m pixelclip_pipelines.supervisor"


def place_on(task: dsl.PipelineTask, cluster: Cluster, name: str, image: str) -> dsl.PipelineTask:
    """Set image, resources, placement, retries, secrets and volume of a task.

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
    for variable, value in pod_environment(step, image, cluster.mlflow_ui).items():
        task.set_env_variable(variable, value)
    task.set_cpu_request(step.cpu).set_cpu_limit(step.cpu_limit)
    task.set_memory_request(step.memory).set_memory_limit(step.memory_limit)
    if step.gpus:
        task.set_accelerator_type(step.gpu_type).set_accelerator_limit(step.gpus)
    if step.shared_memory:
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit=step.shared_memory)
    for key, value in step.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in step.pod_tolerations:
        kubernetes.add_toleration(task, **toleration)
    kubernetes.set_timeout(task, seconds(step.timeout))
    # backoff_max_duration limits all attempts together, counted from the start of the first, not a single delay.
    # This repeats only lost pods: KFP 2.17 sets Argo's retryPolicy to OnError. The supervisor repeats failed containers.
    _supervise(task, name, step)
    task.set_retry(step.retries, f"{seconds(step.backoff)}s", step.backoff_factor, f"{step.total_seconds}s")
    # A cached result would be wrong: KFP identifies input folders by address instead of content, and training and registering
    # change MLflow. Finished results are reused in the workspace.
    task.set_caching_options(False)
    for secret in cluster.secrets:
        for variables in _by_key(secret.env):
            kubernetes.use_secret_as_env(task, secret.name, variables, secret.optional)
    for config in cluster.config_maps:
        for variables in _by_key(config.env):
            kubernetes.use_config_map_as_env(task, config.name, variables, config.optional)
    if cluster.volume.claim:
        kubernetes.mount_pvc(task, cluster.volume.claim, cluster.volume.mount)
    if cluster.pull_policy:
        kubernetes.set_image_pull_policy(task, cluster.pull_policy)
    if cluster.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.pull_secrets))
    return task


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


def set_run_id(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Pass the ID of the KFP run to a task, by which steps find their common MLflow run."""
    return kubernetes.use_field_path_as_env(task, PIPELINE_RUN, RUN_LABEL)
