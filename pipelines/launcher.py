"""The step that starts a TrainJob and waits for it, and the end of a TrainJob whose run ended early."""

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from pixelclip.config import TrainConfig
from pixelclip.workflow.failures import BAD_INPUT
from pixelclip.workflow.stage import Metrics, read_metrics
from pixelclip_pipelines import trainjob_progress
from pixelclip_pipelines.pods import reason_of_api
from pixelclip_pipelines.trainjob import GROUP, NODE, PLURAL, POLL, VERSION, complete, failure_file, job_name, launcher_pod

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT = 5.0  # seconds per request; urllib3 tries four times
_AT_ONCE = (0.5, 0.6)  # seconds to connect and to answer; KFP ends a step 1.4 s after SIGTERM, whatever the grace period
_SILENCE = 300.0  # seconds without a line although the progress is below one percent
_MAX_FAILURES = 40  # consecutive failed requests before the launcher gives up
_REQUEST_ERRORS = (client.ApiException, HTTPError)


def train_on_nodes(job: str, workspace: str, settings: TrainConfig) -> Metrics:
    """Start a TrainJob and wait until it ends. A retry waits for a running job and replaces a failed one.

    SIGTERM deletes the TrainJob at once. `finish` deletes one that is still there.

    Args:
        job: output of `trainjob.template` as JSON.
        workspace: folder on the shared volume with the result of stage masks.
        settings: settings of the training.

    Returns:
        The metrics of the training.

    Raises:
        ValueError: no workspace, or one that is not on the shared volume; the training failed because of its input.
        RuntimeError: the TrainJob failed (`TrainJobError`) or was deleted, or Kubernetes is unreachable or rejects a request.
    """
    if not workspace:
        raise ValueError(
            "training on several nodes needs the parameter `workspace`: a folder on the volume that the nodes share"
        )
    out = Path(workspace, "train")
    launcher = _Launcher(complete(json.loads(job), Path(workspace, "masks"), out, settings), out, settings.steps)
    previous = signal.signal(signal.SIGTERM, launcher.stop)
    try:
        launcher.start()
        condition = launcher.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if condition["type"] == "Failed":
        reason = f"{condition.get('reason', '')} {condition.get('message', '')}".strip()
        failure = failure_file(out)
        code, _, message = failure.read_text().partition(" ") if failure.is_file() else ("", "", "")
        if code == str(BAD_INPUT):
            raise ValueError(f"TrainJob {launcher.job.name} failed: {message}")
        raise TrainJobError(f"TrainJob {launcher.job.name} failed: {message or reason}")
    return read_metrics(out)


class TrainJobError(RuntimeError):
    """A TrainJob failed for another reason than bad input, such as a lost node or the memory."""

    may_pass = True


def delete_unfinished() -> None:
    """Delete the TrainJob of this pipeline run unless it is complete.

    Raises:
        RuntimeError: Kubernetes is unreachable or rejects a request.
    """
    job = TrainJob(job_name())
    try:
        existing = job.get()
        if existing is None:
            print(f"finish: TrainJob {job.name} does not exist", flush=True)
        elif _final_condition(existing).get("type") == "Complete":
            print(f"finish: TrainJob {job.name} is complete", flush=True)
        else:
            job.delete()
            print(f"finish: TrainJob {job.name} was not complete and is deleted", flush=True)
    except _REQUEST_ERRORS as error:
        raise RuntimeError(f"TrainJob {job.name} cannot be deleted: {reason_of_api(error)}") from None


class TrainJob:
    """A TrainJob on the cluster of this pod, or of the kubeconfig outside of a cluster.

    Args:
        name: name of the TrainJob in the pod's namespace.
    """

    def __init__(self, name: str) -> None:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
        self.name = name
        self.namespace = _NAMESPACE.read_text().strip() if _NAMESPACE.is_file() else "default"
        self._path = {"group": GROUP, "version": VERSION, "namespace": self.namespace, "plural": PLURAL}
        self._api = client.CustomObjectsApi()
        hasty = client.Configuration.get_default_copy()
        hasty.retries = False
        self._core = client.CoreV1Api()
        self._api_at_once = client.CustomObjectsApi(client.ApiClient(hasty))

    def get(self) -> dict[str, Any] | None:
        """Return the TrainJob, or None if there is none."""
        try:
            return self._api.get_namespaced_custom_object(**self._path, name=self.name, _request_timeout=_TIMEOUT)
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise

    def pods(self) -> list[client.V1Pod]:
        """Return the pods of the nodes, also failed ones."""
        selector = f"jobset.sigs.k8s.io/jobset-name={self.name},jobset.sigs.k8s.io/replicatedjob-name={NODE}"
        found = self._core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=_TIMEOUT)
        return list(found.items)

    def create(self, body: dict[str, Any]) -> None:
        """Create the TrainJob."""
        self._api.create_namespaced_custom_object(**self._path, body=body, _request_timeout=_TIMEOUT)

    def replace(self, body: dict[str, Any]) -> None:
        """Replace the TrainJob."""
        self._api.replace_namespaced_custom_object(**self._path, name=self.name, body=body, _request_timeout=_TIMEOUT)

    def delete(self, at_once: bool = False) -> None:
        """Delete the TrainJob and its pods if it exists.

        Args:
            at_once: make a single request of at most a second.
        """
        api, timeout = (self._api_at_once, _AT_ONCE) if at_once else (self._api, _TIMEOUT)
        options = {"propagation_policy": "Foreground", "_request_timeout": timeout}
        try:
            api.delete_namespaced_custom_object(**self._path, name=self.name, **options)
        except client.ApiException as error:
            if error.status != 404:
                raise


class _Launcher:
    """Create and watch one TrainJob."""

    def __init__(self, body: dict[str, Any], out: Path, steps: int) -> None:
        self._body, self._out, self._steps = body, out, steps
        self._shown: tuple[int, str] | None = None
        self._shown_at = 0.0
        self._pods_refused = False
        self.job = TrainJob(body["metadata"]["name"])
        self._pause = float(body["metadata"]["annotations"][POLL])

    def stop(self, number: int, _frame: FrameType | None) -> NoReturn:
        """Delete the job at once and end the process, as handler of a signal. A request under way is abandoned."""
        signal.signal(number, signal.SIG_IGN)
        try:
            self.job.delete(at_once=True)
            result = "deleted"
        except Exception as error:  # whatever fails, `finish` tries again
            result = f"could not be deleted ({reason_of_api(error)}); finish will try again"
        os.write(1, f"TrainJob {self.job.name}: {signal.Signals(number).name}; {result}\n".encode())  # print is not reentrant
        raise SystemExit(128 + number)

    def start(self) -> None:
        """Create the job. Keep an existing one unless it failed or is being deleted."""
        try:
            existing = self.job.get()
            if _final_condition(existing).get("type") == "Failed":
                self._print("failed before; replacing it, and training resumes from the last checkpoint")
                self.job.delete()
            elif existing and not existing.get("metadata", {}).get("deletionTimestamp"):
                self._print("already exists")
                self._adopt(existing)
                return
            while existing:
                existing = self.job.get()
                time.sleep(1.0 if existing else 0.0)
            failure_file(self._out).unlink(missing_ok=True)
            self.job.create(self._body)
        except _REQUEST_ERRORS as error:
            status = f"{error.status} " if isinstance(error, client.ApiException) else ""
            raise RuntimeError(f"TrainJob {self.job.name} cannot be created: {status}{reason_of_api(error)}") from None
        selector = f"-n {self.job.namespace} -f -l jobset.sigs.k8s.io/jobset-name={self.job.name}"
        self._print(f"started; its logs: kubectl logs {selector}")

    def _adopt(self, existing: dict[str, Any]) -> None:
        """Make this pod the owner, since Kubernetes deletes the job with the pod of an earlier attempt."""
        owner, metadata = launcher_pod(), existing.get("metadata", {})
        if not owner or owner in metadata.get("ownerReferences", []):
            return
        try:
            self.job.replace(existing | {"metadata": metadata | {"ownerReferences": [owner]}})
        except client.ApiException as error:
            self._print(f"cannot be assigned to this pod ({reason_of_api(error)}); it ends with the pod of the earlier attempt")

    def wait(self) -> dict[str, Any]:
        """Poll until the job has completed or failed, and return its final condition."""
        failures = 0
        while True:
            try:
                job, failures = self.job.get(), 0
            except _REQUEST_ERRORS as error:
                failures += 1
                if failures > _MAX_FAILURES or getattr(error, "status", None) in (401, 403):
                    raise RuntimeError(f"TrainJob {self.job.name} cannot be watched: {reason_of_api(error)}") from None
                self._print(f"Kubernetes does not answer ({reason_of_api(error)}); retrying")
            else:
                if job is None:
                    raise RuntimeError(f"TrainJob {self.job.name} was deleted before it ended")
                if condition := _final_condition(job):
                    return condition
                self._show(job)
            time.sleep(self._pause)

    def _show(self, job: dict[str, Any]) -> None:
        """Print the progress if a node has changed, one percent is done, or no line was printed for a while."""
        percent, text = trainjob_progress.training(job, self._out, self._steps)
        nodes = self._nodes(job)
        now = time.monotonic()
        if (text or nodes) and ((percent, nodes) != self._shown or now - self._shown_at >= _SILENCE):
            self._print(trainjob_progress.MARK + "; ".join(filter(None, [text, nodes])))
            self._shown, self._shown_at = (percent, nodes), now

    def _nodes(self, job: dict[str, Any]) -> str:
        """Return the state of the nodes, or an empty string if it is unknown."""
        if self._pods_refused:
            return ""
        try:
            return trainjob_progress.nodes(job, self.job.pods())
        except _REQUEST_ERRORS as error:
            self._pods_refused = getattr(error, "status", None) in (401, 403)
            if self._pods_refused:
                self._print(f"its nodes are not shown: {reason_of_api(error)}")
            return ""

    def _print(self, event: str) -> None:
        print(f"TrainJob {self.job.name}: {event}", flush=True)


def _final_condition(job: dict[str, Any] | None) -> dict[str, Any]:
    """Return the condition that ended the job, or an empty one."""
    conditions = (job or {}).get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] in ("Complete", "Failed") and each["status"] == "True"), {})
