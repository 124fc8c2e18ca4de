"""A process that promotes, for the test in which several do so at once. It imports little, so that it starts soon."""

import os
import warnings
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from mlflow import MlflowClient

from pixelclip.promote import pass_gate


def promote_again_and_again(uri: str, version: str, trials: int, start: Barrier, results: Queue, end: Barrier) -> None:
    """Promotes its version in every trial, when all are ready; tells what came of it."""
    warnings.simplefilter("ignore")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    client = MlflowClient(uri)
    for trial in range(trials):
        start.wait()
        try:
            results.put((version, pass_gate(client, f"trial{trial}", version, challenge=True).champion, ""))
        except Exception as error:  # for the test to show
            results.put((version, False, repr(error)))
        end.wait()
