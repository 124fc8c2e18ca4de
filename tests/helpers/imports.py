"""The modules of the package and the modules that each of them imports, read from the sources."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "pixelclip"


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}
"""Path of each module by its name below `pixelclip`, such as `train` or `models.decoder`. Packages are listed too."""


def child(module: str) -> str:
    """Return the file or folder directly in `src/pixelclip` that contains a module: `train.py`, `models`."""
    top = module.partition(".")[0]
    return top if (PACKAGE / top).is_dir() else f"{top}.py"


def _dynamic(node: ast.JoinedStr) -> str:
    """Package of f"pixelclip.PACKAGE.{name}", as `import_module` takes it; empty for any other f-string."""
    start = node.values[0].value if isinstance(node.values[0], ast.Constant) else ""
    parts = start.split(".")
    return parts[1] if len(parts) == 3 and (parts[0], parts[2]) == ("pixelclip", "") else ""


@cache
def imported(module: str) -> frozenset[str]:
    """Return the modules that `module` imports, anywhere in its source, and their packages."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pixelclip":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.JoinedStr) and (package := _dynamic(node)):
            names = [f"pixelclip.{name}" for name in MODULES if name.startswith(f"{package}.")]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pixelclip":
                found |= {".".join(parts[1:end]) for end in range(2, len(parts) + 1)}
    return frozenset(found & MODULES.keys() - {module})


def imported_with_theirs(module: str) -> set[str]:
    """Return `module`, the modules it imports, the modules those import, and so on."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imported(name)
    return seen
