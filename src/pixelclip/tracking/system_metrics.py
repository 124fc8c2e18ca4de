"""System metrics of a run: MLflow's monitor of CPU, memory, disk, network and GPUs."""

import logging
import os
from importlib.util import find_spec

from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pixelclip.tracking.server import request_limits

_SECONDS = 5  # time limit of the request that finds the last step of a resumed run


def start_monitor(run_id: str) -> SystemMetricsMonitor | None:
    """Start MLflow's monitor of a run, every 10 s by default (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL).

    Returns:
        The monitor; None without `psutil`, or if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false. GPUs need `pynvml`.
    """
    switch = os.environ.get(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.name, "true").lower()
    if switch not in ("true", "1") or find_spec("psutil") is None:
        return None
    # Its warnings contain the server's URL, with the password. A run without system metrics needs no warning.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    with request_limits(timeout=_SECONDS, retries=0):
        try:
            monitor = SystemMetricsMonitor(run_id, resume_logging=True)
        except Exception:  # MLflow raises many types for a server that does not respond
            return None
    monitor.start()
    return monitor
