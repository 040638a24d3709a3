import pytest
import typer

from services.cli.reading import reading, roles_of


def test_columns_and_the_share_of_invalid_rows_become_fields_of_a_request():
    columns = ["prompt=question", "chosen=a=b"]
    assert roles_of(columns) == {"prompt": "question", "chosen": "a=b"}
    expected = {"columns": roles_of(columns), "invalid_rows": "drop", "max_invalid_share": 0.02}
    assert reading(columns, 0.02) == expected
    assert reading(None, None) == reading([], 0.0) == {}


@pytest.mark.parametrize("given", ["prompt", "prompt=", "nothing=question", "=question"])
def test_other_columns_end_the_command_and_name_the_roles(given, capsys):
    with pytest.raises(typer.Exit):
        roles_of([given])
    shown = capsys.readouterr().err
    assert f"--columns {given}: write ROLE=COLUMN, where ROLE is one of" in shown
    assert "prompt" in shown.partition("one of")[2]
