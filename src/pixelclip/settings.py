"""Settings from params.yaml and the command line, validated by the classes of `config`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pixelclip.config import STAGES, runtime_settings

_Kind = TypeVar("_Kind", bound=BaseModel)
_SHOWN = 80  # characters of a value in a message


def cut(value: object) -> str:
    """Return the representation of a value for a message, at most `_SHOWN` characters of it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `, did you mean X?` for the allowed word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def build(kind: type[_Kind], values: Mapping[str, Any], source: str, sources: Mapping[str, str] | None = None) -> _Kind:
    """Validate the settings of one stage, or another settings file.

    Args:
        kind: settings class.
        values: settings; missing ones have their defaults.
        source: origin of the values, for errors.
        sources: origins of individual settings, if not `source`.

    Raises:
        ValueError: one line per error with origin, setting, value, allowed values and nearest name.
    """
    overridden = sources or {}
    lines = [
        f"{overridden.get(name, source)}: {name}: must be a number (found {cut(values[name])})"  # pydantic accepts true as 1
        for name, field in kind.model_fields.items()
        if field.annotation in (int, float) and isinstance(values.get(name), bool)
    ]
    try:
        config = kind.model_validate(dict(values))
        if not lines:
            return config
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            origin = overridden.get(name, source) if name else ", ".join(dict.fromkeys([source, *overridden.values()]))
            message = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                hint = nearest(name, kind.model_fields) or f"; the settings are {', '.join(kind.model_fields)}"
                lines.append(f"{origin}: unknown setting {cut(name)}{hint}")
            elif fault["type"] in ("string_type", "literal_error") and not isinstance(fault["input"], str):
                # The YAML reader has already changed the text: 1.10 is 1.1 for it.
                lines.append(f"{origin}: {name}: must be text; quote it: '...' (found {cut(fault['input'])})")
            else:
                found = "" if fault["type"] == "value_error" else f" (found {cut(fault['input'])})"  # our validators name it
                lines.append(f"{origin}: {f'{name}: ' if name else ''}{message}{found}")
    raise ValueError("\n".join(lines))


def load(stage: str, params: Path | None = None, overrides: Mapping[str, Any] | None = None, origin: str = "") -> Any:
    """Load the settings of `stage`: defaults, then the stage's section of `params`, then `overrides`.

    Args:
        stage: a key of `STAGES`.
        params: YAML file with one section per stage; the sections of other stages are validated too.
        overrides: `setting: value` or `stage.setting: value`; those of other stages are ignored. A value may be its text.
        origin: origin of `overrides`, for errors; the command line if empty.

    Raises:
        ValueError: unknown section or setting, or invalid value.
    """
    source = str(params) if params else origin or "settings"
    sections = read_yaml(params, "one section per stage") if params else {}
    for name, section in sections.items():
        if name not in STAGES:
            raise ValueError(f"{params}: unknown section {cut(name)}{nearest(str(name), STAGES)}")
        if not isinstance(section, dict | None):
            raise ValueError(f"{params}: section {name!r} must contain settings, found {cut(section)}")
        build(STAGES[name], section or {}, f"{source}: {name}")
    values = dict(sections.get(stage) or {})
    sources: dict[str, str] = {}
    for key, value in (overrides or {}).items():
        prefix, _, name = key.rpartition(".")
        if prefix and prefix not in STAGES:
            raise ValueError(f"unknown stage {prefix!r} in setting {key!r}{nearest(prefix, STAGES)}")
        if prefix in ("", stage):
            values[name] = value
            if params:
                sources[name] = f"{origin or 'command line'}: {stage}"
    return build(STAGES[stage], values, f"{source}: {stage}", sources)


def load_all(params: Path | None, overrides: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
    """Load the settings of every stage as in `load`; every override must name its stage.

    Raises:
        ValueError: as in `load`, or for an override without a stage.
    """
    for key in overrides:
        if "." not in key:
            raise ValueError(f"setting {key!r} must be written STAGE.SETTING; the stages are {', '.join(STAGES)}")
    return {stage: load(stage, params, overrides, origin) for stage in STAGES}


class _Loader(yaml.SafeLoader):
    """Loader that rejects duplicate keys, of which PyYAML would silently keep the last.

    Aliases and tags are rejected: a few nested aliases stand for gigabytes, and PyYAML crashes on unsuitable tags. Integers
    are decimal: YAML 1.1 would read 010 as 8, 1:30 as 90 and 0b11 as 3; here they are text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (as PyYAML declares it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event, problem = self.peek_event(), ""
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases are not supported, write out the value of {f'*{event.anchor}'!r}"
        elif tag := getattr(event, "tag", None):
            problem = f"the tag {tag.replace('tag:yaml.org,2002:', '!!')} is not supported; to make a value text, quote it"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {cut(key.value)}", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


def read_yaml(path: Path, content: str) -> dict[Any, Any]:
    """Read a mapping from a YAML file; an empty file is an empty mapping.

    Args:
        path: the file.
        content: keys and values expected, for errors.

    Raises:
        ValueError: the file is unreadable, not YAML or not a mapping, or has a duplicate key; one line with the position.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{path}: cannot be read as YAML: {error.problem or error.context}{position}") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        deep = "nested too deeply" if isinstance(error, RecursionError) else ""
        message = deep or getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as YAML: {message}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: must contain {content}, found {type(document).__name__}")
    return document


def parse_overrides(pairs: Iterable[str]) -> dict[str, str]:
    """Parse `["steps=10", "train.clip=toy"]` to `{"steps": "10", "train.clip": "toy"}`.

    Values are kept as typed. `load` converts them to the types of their settings, so a text such as `1.10` stays unchanged.

    Raises:
        ValueError: an entry without `=` or without a name.
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"settings are written NAME=VALUE, found {pair!r}")
        values[key.strip()] = text
    return values


def as_table() -> str:
    """Format every setting as Markdown, one table per stage."""
    lines = []
    for stage, kind in STAGES.items():
        lines += [f"## {stage}", "", (kind.__doc__ or "").strip(), "", "| setting | default | meaning |", "|---|---|---|"]
        for name, field in kind.model_fields.items():
            note = " *Runtime.*" if name in runtime_settings(kind) else ""
            lines.append(f"| `{name}` | `{field.default!r}` | {field.description}{note} |")
        lines.append("")
    return "\n".join(lines)
