"""Sweep file: rows of settings, or ranges of settings to search, and the seeds of each."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pixelclip.config import STAGES, EvaluateConfig, TrainConfig
from pixelclip.settings import build, cut, load, nearest, read_yaml
from pixelclip.storage.urls import has_secret, public, public_url

OBJECTIVE = "gain"
"""Metric that a search maximises: its prefix in the metrics of `evaluate`."""
TRIAL = "trial "
"""Name of a row of a search, before the number of the trial from 0."""
_SEED = "train.seed"
_STAGES = ("train", "evaluate")
_ALLOWED = [f"{stage}.{name}" for stage in _STAGES for name in STAGES[stage].model_fields if f"{stage}.{name}" != _SEED]
_Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]


def slug(row: str) -> str:
    """Return the folder name of a row: its words, joined by hyphens."""
    return re.sub(r"[\W_]+", "-", row.casefold()).strip("-")


class Range(BaseModel):
    """Values of one setting in a search: exactly one of the fields. Bounds are included."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    linear: _Bounds | None = None
    log: _Bounds | None = None
    choice: Annotated[list[Any], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one(self) -> "Range":
        given = [name for name in Range.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must have one of linear, log and choice (found {', '.join(given) or 'none'})")
        if self.choice is None and not self.values[0] < self.values[1]:
            raise ValueError(f"{given[0]} {self.values}: the first bound must be less than the second")
        if self.log and self.log[0] <= 0:
            raise ValueError(f"log {self.log}: bounds must be positive")
        return self

    @property
    def values(self) -> list[Any]:
        """The two bounds, or all choices."""
        return self.linear or self.log or self.choice or []


class SweepFile(BaseModel):
    """Schema of a sweep file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    seeds: list[Annotated[int, Field(strict=True, ge=0)]] = Field(default=[0], min_length=1)
    settings: dict[str, Any] | None = None
    rows: dict[str, dict[str, Any] | None] = {}
    ranges: dict[str, Range] = {}
    trials: Annotated[int, Field(strict=True, ge=1)] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> "SweepFile":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: a seed occurs twice")
        if bool(self.rows) == bool(self.ranges):
            raise ValueError(f"must have rows or ranges (found {'both' if self.rows else 'neither'})")
        if bool(self.ranges) != bool(self.trials):
            raise ValueError("ranges and trials, the number of settings to try, need each other")
        folders: dict[str, str] = {}
        for row in self.rows:
            if not slug(row):
                raise ValueError(f"row {row!r}: its name must contain a letter or a digit")
            if (other := folders.setdefault(slug(row), row)) != row:
                raise ValueError(f"rows {other!r} and {row!r} would share the folder {slug(row)!r}")
        return self


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep; `settings` are only the settings of its row."""

    row: str
    seed: int
    settings: dict[str, Any]
    train: TrainConfig
    evaluate: EvaluateConfig

    @property
    def folder(self) -> str:
        """Folder of the run below OUT."""
        return f"{slug(self.row)}/seed-{self.seed}"


@dataclass(frozen=True)
class Search:
    """A sweep over ranges: each trial is a row whose settings are chosen from the results of the trials before.

    `ranges` have values of their settings' types; `configs` are the settings of all trials by stage.
    """

    ranges: dict[str, Range]
    trials: int
    seeds: list[int]
    configs: dict[str, Any]
    source: str

    def runs(self, number: int, values: Mapping[str, Any]) -> list[SweepRun]:
        """Return the runs of a trial, one per seed.

        Raises:
            ValueError: the values do not fit together.
        """
        row = f"{TRIAL}{number}"
        changed = [self._changed({**values, _SEED: seed}, row) for seed in self.seeds]
        return [SweepRun(row, seed, dict(values), *configs) for seed, configs in zip(self.seeds, changed, strict=True)]

    def _changed(self, values: Mapping[str, Any], row: str) -> list[Any]:
        """Return the settings of both stages; they are not read again, so all trials share them."""
        sections: dict[str, dict[str, Any]] = {stage: self.configs[stage].model_dump() for stage in _STAGES}
        for name, value in values.items():
            stage, _, field = name.partition(".")
            sections[stage][field] = value
        return [build(STAGES[stage], section, f"{self.source}: {row}: {stage}") for stage, section in sections.items()]


def tagged(config: TrainConfig, sweep: str, row: str) -> TrainConfig:
    """Return the settings of a run with its name and tags in MLflow, by which the runs of a sweep are found on a cluster."""
    tags = json.loads(config.run_tags or "{}") | {"sweep.name": sweep, "sweep.row": row, "sweep.seed": str(config.seed)}
    return config.model_copy(update={"run_name": f"{row}, seed {config.seed}", "run_tags": json.dumps(tags)})


def read(file: Path, params: Path | None = None) -> tuple[str, list[SweepRun] | Search]:
    """Return the name of a sweep and all its runs, row by row, or its search.

    Args:
        file: YAML as in `SweepFile`.
        params: YAML with one section per stage; the sweep's settings override it.

    Raises:
        ValueError: a row or range has an unknown key or setting, or an invalid value.
    """
    document = read_yaml(file, "rows of settings")
    sweep = build(SweepFile, {"name": file.stem, **{str(key): value for key, value in document.items()}}, str(file))
    shared = _checked(sweep.settings, f"{file}: settings")
    if sweep.trials:
        _checked(sweep.ranges, f"{file}: ranges")
        if both := sorted(sweep.ranges.keys() & shared.keys()):
            raise ValueError(f"{file}: {both[0]} is in settings and in ranges")
        return sweep.name, _search(sweep, sweep.trials, shared, str(file), params)
    runs = []
    for row, settings in sweep.rows.items():
        source = f"{file}: row {row!r}"
        runs += _runs(row, _checked(settings, source), shared, sweep.seeds, params, source)
    return sweep.name, runs


def _runs(
    row: str, values: Mapping[str, Any], shared: Mapping[str, Any], seeds: list[int], params: Path | None, source: str
) -> list[SweepRun]:
    runs = []
    for seed in seeds:
        configs = (load(stage, params, {**shared, **values, _SEED: seed}, source) for stage in _STAGES)
        runs.append(SweepRun(row, seed, public(dict(values)), *configs))
    return runs


def _search(sweep: SweepFile, trials: int, shared: Mapping[str, Any], file: str, params: Path | None) -> Search:
    """Return the search of a file, with bounds and choices of their settings' types.

    Raises:
        ValueError: a bound or choice is not a value of its setting, or the setting has no bounds because it is not a number.
    """
    first = {name: found.values[0] for name, found in sweep.ranges.items()}
    typed = {}
    for name, found in sweep.ranges.items():
        stage, _, field = name.partition(".")
        source = f"{file}: ranges: {name}"
        kind = STAGES[stage].model_fields[field].annotation
        if found.choice is None and kind not in (int, float):
            raise ValueError(f"{source}: is not a number, so it needs choice: [...] (found {cut(found.values)})")
        values = []
        for value in found.values:
            if isinstance(value, str) and has_secret(value):
                raise ValueError(f"{source}: {public_url(value)} contains credentials or a query, which the search would store")
            given = int(value) if kind is int and isinstance(value, float) and value.is_integer() else value
            configs = {each: load(each, params, {**shared, **first, name: given}, source) for each in _STAGES}
            values.append(getattr(configs[stage], field))
        if any(value in values[:position] for position, value in enumerate(values)):
            raise ValueError(f"{source}: a choice occurs twice (found {cut(values)})")
        typed[name] = found.model_copy(update={found.model_dump(exclude_none=True).popitem()[0]: values})
    configs = {each: load(each, params, {**shared, **first}, f"{file}: settings") for each in _STAGES}
    return Search(typed, trials, sweep.seeds, configs, file)


def _checked(settings: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    for name in settings or {}:
        if name == _SEED:
            raise ValueError(f"{source}: {_SEED} is set by `seeds`")
        if name not in _ALLOWED:
            hint = nearest(name, _ALLOWED) or "; a sweep varies train.SETTING and evaluate.SETTING"
            raise ValueError(f"{source}: unknown setting {name!r}{hint}")
    return dict(settings or {})
