"""Every component is described as kubeflow/pipelines-components asks: metadata.yaml and a README equal to the signature."""

import re
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in (ROOT / "components").glob("*/component.py"))
WORDS = {"String": "string", "Integer": "int", "Float": "float", "Boolean": "bool", "Dict": "dict", "List": "list"}
# The fields of scripts/validate_metadata/metadata_schema.json in kubeflow/pipelines-components.
REQUIRED = {"name", "stability", "dependencies", "lastVerified"}
OPTIONAL = {"tags", "ci", "links", "managed", "description"}
VERSION = r"(==|>=|<=|~=)?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"


def component(name: str):
    return getattr(import_module(f"pixelclip_components.{name}.component"), name)


def metadata(name: str) -> dict:
    return yaml.safe_load((ROOT / "components" / name / "metadata.yaml").read_text())


def rows(text: str, title: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this title."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {title} |"):
            next(lines)
            table = []
            for row in lines:
                if not row.startswith("|"):
                    break
                table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]])
            return table
    return []


def kind(spec) -> str:
    word = WORDS.get(spec.type) or spec.type.removeprefix("system.").partition("@")[0]
    return f"list of {word}" if spec.is_artifact_list else word


def default(spec) -> str:
    if not spec.optional:
        return "required"
    shown = f'"{spec.default}"' if isinstance(spec.default, str) else str(spec.default)
    return "none" if spec.default is None else f"`{shown}`"


@pytest.mark.parametrize("name", NAMES)
def test_metadata_has_the_fields_of_kubeflow(name):
    data = metadata(name)
    assert data.keys() >= REQUIRED and data.keys() <= REQUIRED | OPTIONAL
    assert data["name"] == name == component(name).python_func.__name__
    assert data["stability"] in ("alpha", "beta", "stable")
    assert data["dependencies"].keys() <= {"kubeflow", "external_services"}
    assert "Pipelines" in [each["name"] for each in data["dependencies"]["kubeflow"]]
    for group in data["dependencies"].values():
        for each in group:
            assert each.keys() == {"name", "version"} and re.fullmatch(VERSION, each["version"]), each
    assert all(isinstance(tag, str) for tag in data["tags"])
    assert isinstance(data["lastVerified"], datetime) and data["lastVerified"].astimezone(UTC) <= datetime.now(UTC)


@pytest.mark.parametrize("name", NAMES)
def test_readme_equals_the_signature(name):
    text = (ROOT / "components" / name / "README.md").read_text()
    spec = component(name).component_spec
    assert text.startswith(f"# {name}\n")
    found = [row[:3] for row in rows(text, "input")]
    assert found == [[f"`{name}`", kind(each), default(each)] for name, each in spec.inputs.items()]
    found = [row[:2] for row in rows(text, "output")]
    assert found == [[f"`{name}`", kind(each)] for name, each in (spec.outputs or {}).items()]
    assert all(len(row[-1]) > 2 for row in rows(text, "input") + rows(text, "output"))


@pytest.mark.parametrize("name", NAMES)
def test_readme_shows_the_metadata(name):
    data = metadata(name)
    shown = dict(rows((ROOT / "components" / name / "README.md").read_text(), "metadata"))
    needs = ", ".join(f"{each['name']} {each['version']}" for group in data["dependencies"].values() for each in group)
    assert shown == {
        "stability": data["stability"],
        "needs": needs,
        "last verified": f"{data['lastVerified']:%Y-%m-%d}",
        "owners": "[OWNERS](../OWNERS)",
    }
    owners = yaml.safe_load((ROOT / "components" / "OWNERS").read_text())
    assert owners["approvers"] and owners["reviewers"]


def test_required_versions_are_those_that_are_tested():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.M))
    known = {"Pipelines": f">={pinned['kfp']}", "MLflow": f">={pinned['mlflow']}", "Trainer": ">=2.2.0"}
    for name in NAMES:
        for group in metadata(name)["dependencies"].values():
            for each in group:
                assert each["version"] == known[each["name"]], name
