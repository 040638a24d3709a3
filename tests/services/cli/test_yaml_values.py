import pytest

from services.cli.yaml_values import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-.5", -0.5),
        ("010", 10),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("", None),
        ("~", None),
        ("2026-01-01", "2026-01-01"),
        ("12:30", "12:30"),
        ("ft:tiny:raydpo::1", "ft:tiny:raydpo::1"),
        ("hf://datasets/org/name", "hf://datasets/org/name"),
        ('"7"', "7"),
        ("[a, 1, {b: 2}]", ["a", 1, {"b": 2}]),
        ('{"a": [1.5, null]}', {"a": [1.5, None]}),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    found = parse(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["[", "{a: 1, a: 2}", "@x", "{[a]: 1}", "!!python/object:os.system x", "\x00"])
def test_what_is_no_value_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse(text)
