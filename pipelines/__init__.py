"""The Kubeflow pipeline: its DAG, compilation and runners."""

import os
import sys
from types import TracebackType

from pixelclip.storage.urls import scrubbed


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an input or disk error in one line, as the command line does, and any other error with its traceback."""
    if not issubclass(kind, ValueError | OSError):
        sys.__excepthook__(kind, error, trace)
        return
    named = isinstance(error, OSError) and error.filename
    message = f"{error.filename}: {error.strerror}" if named else " ".join(str(error).split())  # type: ignore[attr-defined]
    print(f"pixelclip: {scrubbed(message)}", file=sys.stderr, flush=True)


if os.environ.get("_KFP_RUNTIME") == "true":  # set by KFP in a running step, whose executor does not catch errors
    sys.excepthook = report
