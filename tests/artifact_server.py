"""The artifact half of an MLflow server, which passes files on to a slow store: it answers when the store has them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

from json_server import JsonHandler, served

_PLACE = "/api/2.0/mlflow-artifacts/artifacts"


@contextmanager
def slow_artifacts(ending: str, seconds: float) -> Iterator[str]:
    """Yields where an experiment's artifacts may stand.

    Args:
        ending: of the files that the store is slow with.
        seconds: how long it takes for each of them, there and back.
    """
    files: dict[str, bytes] = {}

    class Handler(JsonHandler):
        def do_PUT(self) -> None:
            path, content = unquote(urlsplit(self.path).path), self.body()
            if path.endswith(ending):
                time.sleep(seconds)
            files[path.removeprefix(f"{_PLACE}/")] = content
            self.answer(200, {})

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if asked.query:
                return self.answer(200, {"files": _below(files, parse_qs(asked.query)["path"][0])})
            content = files[unquote(asked.path).removeprefix(f"{_PLACE}/")]
            if asked.path.endswith(ending):
                time.sleep(seconds)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with served(Handler) as url:
        yield f"{url}{_PLACE}/there"


def _below(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
    inside = {path.removeprefix(f"{folder}/"): content for path, content in files.items() if path.startswith(f"{folder}/")}
    folders = {name.partition("/")[0] for name in inside if "/" in name}
    plain = [{"path": name, "is_dir": False, "file_size": len(content)} for name, content in inside.items() if "/" not in name]
    return [*plain, *({"path": name, "is_dir": True} for name in folders)]
