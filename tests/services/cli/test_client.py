"""Tests how the command reaches the service, and what it prints of errors and of others' text."""

import pytest
import typer

from services.cli.client import fail, print_rows


def test_what_a_stranger_s_file_holds_does_not_reach_the_terminal(capsys):
    with pytest.raises(typer.Exit):
        fail("its keys are \x1b]0;owned\x07 and [/b]")
    assert capsys.readouterr().err == "error: its keys are \ufffd]0;owned\ufffd and [/b]\n"
    print_rows(["a", "b"], [["\x1b[2J[red]", "two\tcells\nof one"]])
    first, second = capsys.readouterr().out.rstrip("\n").split("\t")
    assert (first, second.split()) == ("\ufffd[2J[red]", ["two", "cells", "of", "one"])


def test_service_that_does_not_answer_and_wrong_key_are_told(raydpo, tmp_path):
    assert "nothing answers at http://127.0.0.1:9" in raydpo("models", "list", "--url", "http://127.0.0.1:9/v1").stderr
    wrong = tmp_path / "key"
    wrong.write_text("rd-wrong")
    assert raydpo("models", "list", "--key-file", wrong).exit_code == 1
    assert "no API key" in raydpo("models", "list", "--key-file", tmp_path / "none").stderr


def test_what_looks_like_markup_is_printed_as_it_is(raydpo):
    refused = raydpo("jobs", "create", "--model", "tiny", "--file", "[/red].jsonl")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: [/red].jsonl is neither")
