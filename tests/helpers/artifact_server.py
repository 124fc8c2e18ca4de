"""Fake of MLflow's artifact API with a slow store; it responds when the store has the file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.json_server import JsonHandler, served

_PLACE = "/api/2.0/mlflow-artifacts/artifacts"


@contextmanager
def slow_artifacts(suffix: str, seconds: float) -> Iterator[str]:
    """Yield an artifact location for an experiment.

    Args:
        suffix: suffix of the slow files.
        seconds: duration of each of their uploads and downloads.
    """
    files: dict[str, bytes] = {}

    class Handler(JsonHandler):
        def do_PUT(self) -> None:
            path, content = unquote(urlsplit(self.path).path), self.body()
            if path.endswith(suffix):
                time.sleep(seconds)
            files[path.removeprefix(f"{_PLACE}/")] = content
            self.answer(200, {})

        def do_GET(self) -> None:
            url_parts = urlsplit(self.path)
            if url_parts.query:
                return self.answer(200, {"files": _below(files, parse_qs(url_parts.query)["path"][0])})
            content = files[unquote(url_parts.path).removeprefix(f"{_PLACE}/")]
            if url_parts.path.endswith(suffix):
                time.sleep(seconds)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with served(Handler) as url:
        yield f"{url}{_PLACE}/store"


def _below(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
    inside = {path.removeprefix(f"{folder}/"): content for path, content in files.items() if path.startswith(f"{folder}/")}
    folders = {name.partition("/")[0] for name in inside if "/" in name}
    plain = [{"path": name, "is_dir": False, "file_size": len(content)} for name, content in inside.items() if "/" not in name]
    return [*plain, *({"path": name, "is_dir": True} for name in folders)]
