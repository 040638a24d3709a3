import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from tests.services.training.conftest import build_model

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Is {n} a saw?"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "Aisle 3."}],
    }
    for n in range(20)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        file = tmp_path / "pairs.jsonl"
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return file

    return write


def check(*arguments):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_a_good_file_is_told_without_a_service(write):
    found = check(write(*PAIRS, {**PAIRS[0], "chosen_score": 1, "rejected_score": 2}))
    assert found.exit_code == 0, found.output
    assert "conversations: 21 rows, 21 pairs" in found.stdout
    assert "1 whose scores rate the rejected answer higher: are chosen and rejected swapped? line 21" in found.stdout
    assert "1 that repeat an earlier one word for word, line 21" in found.stdout
    assert "the chosen completion is the longer one in 0%" in found.stdout


def test_a_file_that_would_be_refused_is_told_with_lines_and_pointers(write):
    found = check(write(PAIRS[0], {**PAIRS[1], "chosen": 7}, "{"))
    assert found.exit_code == 1
    assert "✗ 1 × wrong_type, line 2\n    at /chosen\n" in found.stdout
    assert "✗ 1 × invalid_jsonl, line 3" in found.stdout


def test_with_a_model_the_rows_are_shown_as_it_will_see_them(write, model):
    odd = {**PAIRS[0], "prompt": [{"role": "user", "content": "<|assistant|>"}]}
    found = check(write(*PAIRS, odd), "--model", model, "--max-length", 20, "--truncation", "keep_start")
    assert found.exit_code == 0, found.output
    assert "1 with special tokens of the model in their text, line 21" in found.stdout
    assert "limit 20 tokens, keep_start" in found.stdout
    assert "⟦Y e s . </s>⟧" in found.stdout
    assert found.stdout.count("\nline ") == 10
    assert "with the rejected cut, line 1," in found.stdout


@pytest.mark.parametrize("form", ["plain", "gzip"])
def test_the_report_is_json_on_demand(write, model, form):
    file = write(*PAIRS)
    if form == "gzip":
        file.write_bytes(gzip.compress(file.read_bytes()))
    report = json.loads(check(file, "--json", "--model", model).stdout)
    assert report["survey"]["num_rows"] == report["tokens"]["num_kept"] == 20
    assert len(report["preview"]) == 10
    assert list(json.loads(check(file, "--json").stdout)) == ["survey"]


def test_what_the_template_does_not_read_is_told(write, model):
    file = write(*PAIRS, {**PAIRS[0], "prompt": [{"role": "user", "content": "Well?", "name": "Ann"}]})
    found = check(file, "--model", model).stdout
    assert "1 with messages/name, which the chat template does not read, line 21" in found
    tokens = json.loads(check(file, "--json", "--model", model).stdout)["tokens"]
    assert tokens["unread"] == {"messages/name": {"count": 1, "first": [21]}}


def test_rows_that_cannot_be_used_may_be_left_out_up_to_a_share(write, model):
    file = write(*PAIRS, {"text": "x"})
    assert check(file).exit_code == 1
    assert check(file, "--max-invalid-share", 0.01).exit_code == 1
    found = check(file, "--max-invalid-share", 0.1, "--model", model)
    assert found.exit_code == 0, found.output
    assert "✗ 1 × unknown_format, line 21" in found.stdout
    assert "1 rows are left out; all other rows can be used" in found.stdout
    assert "20 of 20 to train on" in found.stdout


def test_columns_of_any_name_are_read_by_their_roles(write, model):
    file = write(*({"ask/it": f"{n}?", "good": f"{n}.", "bad": "No."} for n in range(20)))
    assert check(file).exit_code == 1
    roles = [word for pair in ("prompt=ask/it", "chosen=good", "rejected=bad") for word in ("--columns", pair)]
    found = check(file, *roles, "--model", model)
    assert found.exit_code == 0, found.output
    assert "prompt/chosen/rejected texts: 20 rows, 20 pairs" in found.stdout
    assert "20 of 20 to train on" in found.stdout
    assert "write ROLE=COLUMN" in check(file, "--columns", "answer=good").stderr


def test_nothing_left_to_train_on_is_a_failure(write, model):
    found = check(write(*PAIRS), "--model", model, "--max-length", 4)
    assert found.exit_code == 1
    assert "no row is left to train on" in found.stderr


def test_what_the_template_says_is_quoted_with_a_remedy(write, model, tmp_path):
    strict = shutil.copytree(model, tmp_path / "strict")
    template = strict / "chat_template.jinja"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template.write_text(refuses + template.read_text())
    rows = [{**pair, "prompt": [{"role": "system", "content": "Be brief."}, *pair["prompt"]]} for pair in PAIRS]
    some, none = (check(write(*kept), "--model", strict) for kept in ([*rows, PAIRS[0]], rows))
    assert (some.exit_code, none.exit_code) == (0, 1)
    for found in (some, none):
        assert "Line 1: the chat template refuses the messages (System role not supported); change" in found.output
    assert "change the messages or the chat template" in none.stderr
    assert "--max-length" not in none.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "./nowhere"], "./nowhere is not a folder"),
        (["--model", os.sep], "The model cannot be used: "),
        (["--max-length", 8], "--max-length counts tokens, and needs a model's tokenizer; add --model."),
        (["--model", "x", "--max-length", 1], "max_length is 1; it must be from 2 to 1048576."),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(write, options, says):
    found = check(write(*PAIRS), *options)
    assert found.exit_code == 1
    assert says in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.slow
def test_without_transformers_the_remedy_is_told(write, model, monkeypatch):
    program = "import sys; sys.modules['transformers'] = None; from services.cli.app import app; app()"
    command = [sys.executable, "-c", program, "data", "check", str(write(*PAIRS))]
    assert subprocess.run(command, capture_output=True).returncode == 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = check(write(*PAIRS), "--model", model)
    assert found.exit_code == 1
    assert "--model needs transformers: pip install 'raydpo[cluster]'" in found.stderr


def test_what_a_terminal_would_obey_is_not_printed(write, model):
    rows = [{**PAIRS[0], "\x1b]0;gotcha\x07": 1, "prompt": [{"role": "user", "content": "\x1b[31m[bold]red"}]}]
    found = check(write(*rows), "--model", model)
    assert "\x1b" not in found.stdout
    assert "\x07" not in found.stdout
    assert "]0;gotcha" in found.stdout
