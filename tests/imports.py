"""Which modules of the package a module imports, read from the source."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "pixelclip"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported(module: str) -> set[str]:
    """Modules of pixelclip that `module` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pixelclip":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pixelclip."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pixelclip.")}
    return found & set(MODULES)


def imported_with_theirs(module: str) -> set[str]:
    """`module`, what it imports, what those import, and so on."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imported(name)
    return seen
