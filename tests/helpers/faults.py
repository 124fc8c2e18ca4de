"""The table of faults: how many trials survived. `make test-faults` prints it at its end."""

import json
from pathlib import Path

TABLE = Path(__file__).parents[2] / "runs" / "faults.json"


def record(fault: str, trials: int, survived: int) -> None:
    """Add or replace a row of the table."""
    rows = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    rows[fault] = [trials, survived]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps(rows, indent=1))


def table() -> str:
    """Format the table as Markdown."""
    rows = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    lines = ["| fault | trials | survived |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {fault} | {trials} | {survived} |" for fault, (trials, survived) in rows.items())])


if __name__ == "__main__":
    print(table())
