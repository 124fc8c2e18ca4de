"""Process for the test of concurrent promotions; it has few imports, so that it starts quickly."""

import os
import warnings
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from mlflow import MlflowClient

from pixelclip.registry.promotion import pass_gate


def promote_again_and_again(uri: str, version: str, trials: int, start: Barrier, results: Queue, end: Barrier) -> None:
    """Promote a version in every trial when all processes are ready, and report the outcome."""
    warnings.simplefilter("ignore")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    client = MlflowClient(uri)
    for trial in range(trials):
        start.wait()
        try:
            results.put((version, pass_gate(client, f"trial{trial}", version, challenge=True).champion, ""))
        except Exception as error:  # shown by the test
            results.put((version, False, repr(error)))
        end.wait()
