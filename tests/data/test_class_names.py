import hashlib
import json
from importlib import resources

import open_clip
import pytest

from pixelclip.data.class_names import benchmark_names, check_names, names_of, parse_names, read_classes
from pixelclip.models.text import TEMPLATES


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "classes: the list of class names is empty"),
        (["dog", "  ", "sky", " , "], "blank class name at position 2, 4"),
        (["dog", "sky", " dog"], "found twice: 'dog'"),
    ],
)
def test_unusable_class_names_are_rejected(names, message):
    with pytest.raises(ValueError, match=message):
        check_names(names)


@pytest.mark.parametrize("character", [chr(code) for code in (*range(1, 32), *range(127, 160)) if chr(code) not in "\n\r"])
def test_control_characters_are_rejected_without_printing_them(tmp_path, character):
    for names in (["sky", f"dog{character}[31m, cat"], [f"a, b{character}b"]):
        with pytest.raises(ValueError, match=r"^classes: class names must not contain control characters, found '") as error:
            check_names(names)
        assert character not in str(error.value)
    with pytest.raises(ValueError, match="control characters"):
        parse_names(f"sky,dog|pup{character}py")
    if not character.isspace() and character != "\x85":  # other separators of lines
        (tmp_path / "c.txt").write_text(f"sky\ndog{character}[0m\n")
        with pytest.raises(ValueError, match=r"c\.txt: class names must not contain control characters"):
            read_classes(tmp_path / "c.txt")


def test_duplicate_check_takes_linear_time():
    names = [str(number) for number in range(100_000)]  # a quadratic check would take minutes
    assert check_names(names) == names


def test_line_of_names_is_parsed_with_synonyms():
    assert parse_names("dog|puppy, traffic light ,sky") == ["dog, puppy", "traffic light", "sky"]
    assert parse_names("dog") == ["dog"]


def test_bar_separates_synonyms_in_a_file_as_in_a_line(tmp_path):
    (tmp_path / "c.txt").write_text("sky|heaven\ngrass | lawn \ndog, puppy|whelp\n")
    assert read_classes(tmp_path / "c.txt") == ["sky, heaven", "grass, lawn", "dog, puppy, whelp"]
    assert read_classes(tmp_path / "c.txt")[:2] == parse_names("sky|heaven,grass | lawn ")
    (tmp_path / "c.txt").write_text("sky\n|\n")
    with pytest.raises(ValueError, match="blank class name at position 2"):
        read_classes(tmp_path / "c.txt")


@pytest.mark.parametrize("text", ["", "  ", "|", "dog,,sky", "dog,dog", "dog| puppy,dog|puppy"])
def test_unusable_line_of_names_is_rejected(text):
    with pytest.raises(ValueError, match=r"empty|blank|twice"):
        parse_names(text)


def test_names_come_from_a_file_or_a_line_of_any_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = [f"thing {number}" for number in range(40)]
    assert names_of(",".join(many)) == many
    (tmp_path / "dog").write_text("cat\n")
    assert names_of("dog") == ["cat"]
    with pytest.raises(ValueError, match=r"dogs\.txt: cannot read class names \(one per line\)"):
        names_of("dogs.txt")


# MD5 of the reference implementation's JSON file without a final line break, and the names that differ from the readable ones.
@pytest.mark.parametrize(
    ("kind", "md5", "differing"),
    [
        ("ade20k", "321914a766e6c0d1529d934649e509bb", 84),
        ("coco-stuff", "bd6c981512a726d460d8e94af131124b", 31),
        ("pascal-context", "35935e31e54dbcb20797a013ee237c11", 3),
        ("voc", "9429cb65cfd04277254ff04bf660a9e5", 3),
        ("cityscapes", "faa19de44d04e0fe2d16c4e1a0ddfee1", 0),
    ],
)
def test_shipped_lists_are_the_reference_and_the_readable_names(kind, md5, differing):
    folder = resources.files("pixelclip").joinpath("assets/classes")
    reference, readable = (
        folder.joinpath(f"{names}/{kind}.txt").read_text().removesuffix("\n").split("\n") for names in ("reference", "readable")
    )
    assert hashlib.md5(json.dumps(reference).encode()).hexdigest() == md5
    assert sum(one != other for one, other in zip(reference, readable, strict=True)) == differing
    assert benchmark_names("reference", kind) == [name.strip() for name in reference]
    assert benchmark_names("readable", kind) == readable
    tokenizer = open_clip.SimpleTokenizer()  # removes the blank after "bed", too
    for name in reference:
        for template in TEMPLATES["ensemble"]:
            assert tokenizer.encode(template.replace("{}", name)) == tokenizer.encode(template.replace("{}", name.strip()))


def test_names_that_are_neither_a_list_nor_a_file_are_rejected():
    with pytest.raises(ValueError, match=r"^'readible' must be reference, readable or a file"):
        benchmark_names("readible", "voc")
