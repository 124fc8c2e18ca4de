"""Settings: accepted and rejected values, and errors with origin, value and allowed values."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pixelclip import config
from pixelclip.config import STAGES, lasting
from pixelclip.settings import as_table, build, load, load_all, nearest, parse_overrides

PARAMS = Path(__file__).parents[1] / "params.yaml"


@pytest.fixture
def params(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults_then_file_then_overrides(params) -> None:
    path = params("train:\n  steps: 7\n  batch_size: 3\n")
    loaded = load("train", path, {"steps": 9, "train.seed": 5, "shards.jpeg_quality": 1})
    assert (loaded.steps, loaded.batch_size, loaded.seed, loaded.concepts) == (9, 3, 5, 64)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  setps: 7\n", ["my.yaml", "train", "'setps'", "did you mean 'steps'?"]),
        ("masks:\n  wokers: 7\n", ["my.yaml", "masks", "'wokers'", "did you mean 'workers'?"]),  # of another stage
        ("trian:\n  steps: 7\n", ["my.yaml", "'trian'", "did you mean 'train'?"]),
        ("register:\n  zzzzzz: 7\n", ["'zzzzzz'", "the settings are name, min_gain"]),
        ("train:\n  steps: 0\n", ["my.yaml", "train", "steps", "greater than or equal to 1", "found 0"]),
        ("train:\n  steps: 1.5\n", ["my.yaml", "steps", "integer", "found 1.5"]),
        ("train:\n  residual: both\n", ["residual", "'cls' or 'patch'", "found 'both'"]),
        ("train:\n  steps: many\n  side: 3\n", ["steps", "found 'many'", "side", "found 3"]),
        ("train:\n  gradient_clip: .inf\n", ["gradient_clip", "finite"]),
        ("train:\n  cutout_min: .6\n", ["cutout_min 0.6 is larger than cutout_max 0.5"]),
        ("train:\n  concept_kind: vectors\n  templates: ensemble\n", ["templates must be single", "found ensemble"]),
        ("evaluate:\n  shortest_edge: 9000\n", ["shortest_edge 9000 is larger than longest_edge 2560"]),
        ("train:\n  shortest_edge: 2000\n", ["shortest_edge 2000 is larger than longest_edge 1333"]),
        ("train: 3\n", ["my.yaml", "'train'", "found 3"]),
        ("train:\n  off: 3\n", ["my.yaml", "train", "False"]),  # YAML reads `off` as a truth value
        ("- train\n", ["my.yaml", "found list"]),
        ("train: [\n", ["my.yaml", "cannot be read as YAML", "(line 2, column 1)"]),
        ("train:\n  steps: 3\n  side: 64\n  steps: 4\n", ["my.yaml", "duplicate key 'steps' (line 4, column 3)"]),
        ("toy:\n  train_scenes: true\n", ["my.yaml", "toy: train_scenes: must be a number (found True)"]),
        ("masks:\n  device: foo\n", ["masks: device: unknown device 'foo'; allowed: auto, cpu, cuda, cuda:N, mps"]),
        ("train:\n  mask_grid: 100000\n", ["train: mask_grid", "less than or equal to 4096", "found 100000"]),
    ],
)
def test_error_names_file_setting_value_and_allowed_values(params, text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"(?s).") as refusal:
        load("train", params(text))
    assert [word for word in words if word not in str(refusal.value)] == []


def test_invalid_yaml_is_one_line(params) -> None:
    for text in ("[1", "a: b: c", "\tx: 1", "a: \x07"):
        with pytest.raises(ValueError, match=r"^\S*my\.yaml: cannot be read as YAML: .+$"):
            load("train", params(text))


LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a0: &a0 [x]\n{LAUGHS}train: *a8\n", r"write out the value of '\*a0' .line 2, column \d+."),
        ("a: &a [*a]\n", "aliases are not supported"),
        ("train: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("train: !!timestamp soon\n", r"!!timestamp is not supported; .* .line 1, column 8.$"),
        ("train: !!int many\n", "!!int is not supported"),
        ("train: !!python/object:os.system x\n", "!!python/object:os.system is not supported"),
        ("train: 2024-13-45\n", "month must be in 1..12"),
        ("train:\n  steps: " + "9" * 5000, ""),
        (b"train: \xff", ""),
    ],
    ids=["laughs", "self", "deep", "timestamp", "int", "python", "date", "digits", "bytes"],
)
def test_hostile_yaml_is_one_short_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^\S*my\.yaml: cannot be read as YAML: .*{message}") as refusal:
        load("train", path)
    assert len(str(refusal.value)) < 300 + len(str(path)) and "\n" not in str(refusal.value)


def test_long_values_are_cut_in_messages(params) -> None:
    for text in (f"train: {'x' * 9999}\n", f"train:\n  steps: {'x' * 9999}\n", f"{'x' * 900}: 1\n"):
        with pytest.raises(ValueError, match=r"my\.yaml.*xxx\.\.\.") as refusal:
            load("train", params(text))
        assert len(str(refusal.value)) < 500


def test_error_names_the_origin_of_the_value(params) -> None:
    path = params("train:\n  steps: 5\n  shortest_edge: 900\n")
    for overrides, said in (
        ({"steps": 0}, r"^command line: train: steps: .*found 0\)$"),
        ({"train.steps": 0}, r"^command line: train: steps: .*found 0\)$"),
        ({"stpes": 1}, r"^command line: train: unknown setting 'stpes'"),
        ({"longest_edge": 800}, r"my\.yaml: train, command line: train: shortest_edge 900 is larger than longest_edge 800$"),
    ):
        with pytest.raises(ValueError, match=said):
            load("train", path, overrides)
    path.write_text("train:\n  steps: 0\n")
    with pytest.raises(ValueError, match=r"my\.yaml: train: steps"):
        load("train", path, {"side": 64})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load("train", tmp_path / "none.yaml")


def test_an_override_of_an_unknown_stage_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown stage 'trian' .* did you mean 'train'\?"):
        load("train", None, {"trian.steps": 3})
    with pytest.raises(ValueError, match=r"'steps' must be written STAGE\.SETTING"):
        load_all(None, {"steps": 3})
    assert load_all(None, {"train.steps": 3})["train"].steps == 3


def test_whole_floats_are_integers_because_kfp_turns_integers_to_floats() -> None:
    steps = build(STAGES["train"], {"steps": 10000.0}, "here").steps
    assert steps == 10000 and type(steps) is int


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("train").steps = 3


def test_pairs_are_converted_to_the_type_of_their_setting() -> None:
    pairs = ["steps=10", "train.clip=toy", "flip=false", "color_jitter=no", "learning_rate_backbone=2e-6", "concept_names="]
    loaded = load("train", None, parse_overrides(pairs))
    assert (loaded.steps, loaded.clip, loaded.flip, loaded.color_jitter) == (10, "toy", False, False)
    assert (loaded.learning_rate_backbone, loaded.concept_names) == (2e-6, "")
    assert parse_overrides(["a=b=c", " x = y "]) == {"a": "b=c", "x": " y "}


@pytest.mark.parametrize("pair", ["steps", "=3"])
def test_invalid_pair_is_named(pair: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(pair))):
        parse_overrides([pair])


@pytest.mark.parametrize("value", ["", "x", "1.5", "[1]", "true", "null", "3 # three", '"3"', "1:30", "@x", "{a"])
def test_override_that_is_no_number_is_rejected_as_typed(value: str) -> None:
    with pytest.raises(ValueError, match="steps: Input should be a valid integer.*" + re.escape(f"(found {value!r})")):
        load("train", None, parse_overrides([f"steps={value}"]))


# Of these YAML changes everything but the first.
TEXTS = ("set", "1.10", "007", "0123456", "2024_01", "1e3", "0x1f", "1:30", "2024-01-01", "yes", "null", "~", "set #2",
         "dog #1,cat", "a: b", "[x", "{x", "@x", "'x'", '"x"', " x ", "!x", "&x", "*x", "- x", "x\ty", "ä\u2028")  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_is_kept_as_typed(text: str) -> None:
    for name in ("path", "fetch_data.path"):
        assert load("fetch_data", PARAMS, parse_overrides([f"{name}={text}"])).path == text


@given(text=st.text(min_size=1))
def test_any_text_on_the_command_line_is_kept_as_typed(text: str) -> None:
    assert load("fetch_data", None, parse_overrides([f"revision={text}"])).revision == text


@pytest.mark.parametrize("value", ["1.10", "7", "2024-01-01", "yes", "null", "[a]"])
def test_unquoted_value_of_a_text_setting_in_a_file_is_rejected(params, value: str) -> None:
    with pytest.raises(ValueError, match=r"my\.yaml: fetch_data: revision: must be text; quote it: '\.\.\.' \(found .+\)$"):
        load("fetch_data", params(f"fetch_data:\n  revision: {value}\n"))
    assert load("fetch_data", params(f"fetch_data:\n  revision: '{value}'\n")).revision == value


@pytest.mark.parametrize(("number", "value"), [("010", 10), ("0010", 10), ("1_000", 1000), ("90", 90)])
def test_integers_in_a_file_are_decimal(params, number: str, value: int) -> None:
    assert load("train", params(f"train:\n  seed: {number}\n")).seed == value
    assert load("train", None, parse_overrides([f"seed={number}"])).seed == value
    assert load("fetch_data", params(f"fetch_data:\n  path: x\ntrain:\n  seed: {number}\n")).path == "x"


def test_text_of_digits_that_is_no_yaml_integer_is_kept(params) -> None:
    for text in ("007", "0123456", "0x1f", "1:30", "0b11"):  # YAML 1.1 has octal, hexadecimal and sexagesimal numbers
        assert load("fetch_data", params(f"fetch_data:\n  revision: {text}\n")).revision == text


def test_nearest_is_empty_without_a_close_match() -> None:
    assert nearest("stpes", ["steps", "side"]) == ", did you mean 'steps'?"
    assert nearest("qqqq", ["steps", "side"]) == ""


@pytest.mark.parametrize("text", ["team=vision", "[1]", "[]", '[["a", "b"]]', '{"a": 1}', '"a"', "{"])
def test_tags_of_a_run_are_a_json_object_of_texts(text: str) -> None:
    assert load("train", overrides={"run_tags": '{"team": "vision"}'}).run_tags == '{"team": "vision"}'
    with pytest.raises(ValueError, match="run_tags: must be a JSON object of texts, such as"):
        load("train", overrides={"run_tags": text})


def test_runtime_settings_are_not_in_the_fingerprint() -> None:
    assert set(STAGES["train"].model_fields) - set(lasting(load("train"))) == {
        "accumulate", "device", "workers", "log_every", "checkpoint_every", "checkpoint_minutes", "picture_every",
        "max_bad_share", "run_name", "run_tags", "evaluate_every", "evaluate_on",
    }  # fmt: skip
    assert set(STAGES["masks"].model_fields) - set(lasting(load("masks"))) == {
        "batch_size", "device", "max_bad_share", "sam_points_per_batch", "workers",
    }  # fmt: skip
    assert set(lasting(load("shards"))) == {"images_per_shard", "shortest_edge", "jpeg_quality"}
    assert "max_bad_share" not in lasting(load("evaluate"))


def test_params_yaml_states_every_setting_of_every_stage() -> None:
    stated = yaml.safe_load(PARAMS.read_text())
    assert {stage: sorted(settings) for stage, settings in stated.items()} == {
        stage: sorted(kind.model_fields) for stage, kind in STAGES.items()
    }
    loaded = load_all(PARAMS, {})
    assert {stage: settings.model_dump() for stage, settings in loaded.items()} == stated


def test_the_defaults_are_the_papers() -> None:
    train = load("train")
    assert (train.side, train.shortest_edge, train.longest_edge, train.crop, train.mask_grid) == (320, 1024, 1333, 640, 256)
    assert (train.steps, train.batch_size, train.concepts, train.prompt_tokens) == (10_000, 48, 64, 4)
    assert (train.learning_rate_decoder, train.learning_rate_backbone, train.learning_rate_prompts) == (2e-4, 2e-6, 2e-3)
    assert (train.weight_decay, train.gradient_clip, train.final_learning_rate_share) == (1e-4, 0.01, 0.5)


def test_the_table_has_a_row_for_every_setting() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `.+` \| .+ \|$", as_table(), re.M)
    assert rows == [name for kind in config.STAGES.values() for name in kind.model_fields]


@pytest.mark.parametrize(("text", "scales"), [("1.5", [1.5]), ("[1.25, 2]", [1.25, 2.0]), ("1.25,2", [1.25, 2.0]), ("[]", [])])
def test_list_of_numbers_is_read_from_the_command_line(text, scales):
    assert load("evaluate", overrides={"evaluate.scales": text}).scales == scales


def test_invalid_number_in_a_list_is_named():
    with pytest.raises(ValueError, match=r"scales.*valid number.*two"):
        load("evaluate", overrides={"evaluate.scales": "1.5,two"})
