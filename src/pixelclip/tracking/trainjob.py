"""Progress of a training in the status of its TrainJob (Kubeflow Trainer 2.2 or newer, KEP-2779).

With its feature gate TrainJobStatus, Kubeflow Trainer gives every node an address, the file of a certificate authority and the
file of a token. What is sent there is in `status.trainerStatus` of the TrainJob, and so in `kubectl get trainjob`.
"""

import json
import math
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

from pixelclip.workflow.failures import first_line

URL, CERTIFICATE, TOKEN = (f"KUBEFLOW_TRAINER_STATUS_{name}" for name in ("URL", "CA_CERT", "TOKEN"))
STEP, STEPS = "step", "steps"
"""Metrics of the status besides those that are shown, such as `loss`."""
_TIMEOUT = 2.0  # seconds; the training waits for the answer
_PAUSE = 300.0  # seconds without attempts after a failed one
_LONGEST = 64  # characters of a metric


class TrainJobStatus:
    """Sender of progress; it does nothing outside of a TrainJob and never raises for a failing server."""

    def __init__(self) -> None:
        self._url, self._next, self._failed = os.environ.get(URL, ""), 0.0, False

    def send(self, done: int, total: int | None, seconds_left: float | None, values: Mapping[str, str]) -> None:
        """Send the progress; print one warning at the first failure.

        Args:
            done: steps done.
            total: all steps, if known.
            seconds_left: expected time until the end, if known.
            values: other metrics, as text.
        """
        if not self._url or time.monotonic() < self._next:
            return
        metrics = {STEP: str(done), **({STEPS: str(total)} if total else {}), **values}
        status = {
            "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds"),
            "metrics": [{"name": name[:_LONGEST], "value": value[:_LONGEST]} for name, value in metrics.items() if value],
            **({"progressPercentage": 100 * done // total} if total else {}),
            **({"estimatedRemainingSeconds": math.ceil(seconds_left)} if seconds_left is not None else {}),
        }
        try:
            self._post(json.dumps({"trainerStatus": status}).encode())
        except (OSError, ValueError, HTTPException) as error:
            self._next = time.monotonic() + _PAUSE
            if not self._failed:
                reason = first_line(error, self._url)
                print(f"cannot send the progress to Kubeflow Trainer ({reason}); training goes on", flush=True)
            self._failed = True

    def _post(self, body: bytes) -> None:
        token = Path(os.environ.get(TOKEN, "")).read_text().strip()  # each time, because Kubernetes renews it every hour
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        context = ssl.create_default_context(cafile=os.environ.get(CERTIFICATE))
        # Without a proxy: the server is in the cluster.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        with opener.open(urllib.request.Request(self._url, body, headers), timeout=_TIMEOUT):
            pass
