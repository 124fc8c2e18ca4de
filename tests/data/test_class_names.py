import pytest

from pixelclip.data.class_names import check_names, names_of, parse_names, read_classes


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
