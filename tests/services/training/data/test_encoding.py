import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from operator import gt, ne
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers

from dpo_core.config import TrainConfig
from dpo_core.data.feedback import read_groups
from dpo_core.encoding.encode import EncodedGroup, encode_group
from dpo_core.models.model import load_tokenizer
from dpo_core.options import Simpo, Supervised
from services import storage
from services.contract import AttemptSpec, InvalidRows, Message, Progress, Report
from services.training.data import dataset, encoding
from services.training.data.dataset import Part
from services.training.data.encoding import (
    Encoded,
    Piece,
    encode,
    encode_piece,
    recipe_of,
    refuse_unusable,
    report_contents,
    split,
)
from services.training.reports.reporting import JobFailed
from tests.dpo_core.conftest import build_tokenizer

MakeSpec = Callable[..., AttemptSpec]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "ROWS_PER_PIECE", 7)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[AttemptSpec], tuple[list[EncodedGroup], list[Report]]]:
    """Returns a function that encodes a file in this process, and returns the groups and the reports.

    It starts with the last piece of the file, because a cluster keeps no order either.
    """

    def run(spec: AttemptSpec) -> tuple[list[EncodedGroup], list[Report]]:
        reports: list[Report] = []
        uri = (tmp_path / "encoded").as_uri()

        def encode_pieces(pieces: list[Piece]) -> Iterator[Encoded]:
            return (encode_piece(recipe_of(spec), uri, piece) for piece in reversed(pieces))

        made = encode(spec, uri, encode_pieces, reports.append)
        refuse_unusable(spec, made)
        report_contents(spec, made, "Training", reports.append)
        return list(dataset.read_groups(made.training)), reports

    return run


def test_a_max_length_beyond_the_models_positions_is_refused(make_spec: MakeSpec, run: Any) -> None:
    with pytest.raises(JobFailed) as failure:
        run(make_spec(config=TrainConfig(max_length=5000)))
    report = failure.value.report
    assert (report.code, report.param) == ("invalid_value", "x_raydpo.max_length")
    assert "max_length is 5000, but the model has only" in report.message


def test_pieces_are_whole_lines_and_cover_the_file(tmp_path: Path) -> None:
    rows = [b'{"a": 1}\n', b"\r\n", b"\n", *(b'{"a": %d}\r\n' % n for n in range(20)), b"\n", b'{"last": 1}']
    data = b"\xef\xbb\xbf" + b"".join(rows)
    (tmp_path / "f").write_bytes(data)
    pieces = list(split(str(tmp_path / "f")))
    assert b"".join(data[piece.start : piece.start + piece.size] for piece in pieces) == data
    assert [piece.num_rows for piece in pieces] == [7, 7, 7, 1]
    assert [piece.first_line for piece in pieces] == [1, 10, 17, 25]
    assert [piece.number for piece in pieces] == [0, 1, 2, 3]


def test_rows_of_one_group_are_in_one_piece(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n // 3}?", "response": "Yes." * n, "helpfulness": n} for n in range(30)]
    (tmp_path / "f").write_text("\n\n".join(map(json.dumps, rows)))
    assert [piece.num_rows for piece in split(str(tmp_path / "f"))] == [9, 9, 9, 3]


def test_an_empty_tail_makes_no_piece(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'{"a": 1}\n' * 7 + b"\n\n")
    assert len(list(split(str(tmp_path / "f")))) == 1


def test_groups_come_in_the_order_of_the_file_with_their_lines(make_spec: MakeSpec, pairs: str, run: Any) -> None:
    groups, reports = run(make_spec())
    tokenizer = load_tokenizer(make_spec().model_source)
    with storage.open_input(pairs) as file:
        assert groups == [encode_group(group, tokenizer) for group in read_groups(file)]
    assert reports[-2] == Message(message="Training file has 24 pairs (OpenAI preference format).")
    chosen, rejected = ([len(group.completion_ids[i]) for group in groups] for i in (0, 1))
    bias = sum(map(gt, chosen, rejected)) / sum(map(ne, chosen, rejected))
    assert reports[-1].message == (
        f"Average number of tokens: prompt 19 (at most 19), chosen 10 (at most {max(chosen)}), rejected 10 "
        f"(at most 12); max_length 128, truncation drop. The chosen answer is the longer one in {bias:.0%} of the rows."
    )
    progress = [report for report in reports if isinstance(report, Progress)]
    assert (progress[0].done, progress[-1].done, progress[-1].total) == (0, 24, 24)


def test_long_groups_are_left_out_and_named(make_spec: MakeSpec, run: Any) -> None:
    tokens = {group.line: len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in run(make_spec())[0]}
    limit = sorted(tokens.values())[5]
    long = [line for line, length in tokens.items() if length > limit]
    groups, reports = run(make_spec(config=TrainConfig(max_length=limit)))
    assert [group.line for group in groups] == [line for line in tokens if line not in long]
    assert len(long) > 10
    lines = ", ".join(map(str, long[:10]))
    assert reports[-1] == Message(
        level="warn",
        message=f"Left out {len(long)} of 24 pairs: they are longer than {limit} tokens "
        f"(line {lines} and {len(long) - 10} more); raise max_length, choose another truncation, or shorten the rows.",
    )


def test_rankings_of_real_shape_keep_their_ratings_and_those_without_an_order_are_left_out(
    make_spec: MakeSpec, run: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Sky?", "completions": [" Green.", " Blue."], "ranks": [2, 1], "weight": 0.5},
        {"prompt": "Sun?", "completions": [" Green.", " Blue."], "ranks": [1, 1]},
        {"prompt": "Sea?", "completions": [" Red.", " Blue.", " Blue!"], "ranks": [2, 1, 1]},
    ]
    (tmp_path / "ranked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups, reports = run(make_spec(training_uri=str(tmp_path / "ranked.jsonl")))
    found = [(group.line, group.ratings, group.weight) for group in groups]
    assert found == [(1, (-1.0, -2.0), 0.5), (3, (-1.0, -1.0, -2.0), 1.0)]
    assert reports[-3].message == "Training file has 3 rankings (prompt/completions/ranks format)."
    assert reports[-1].message == (
        "Left out 1 of 3 rankings: all their completions have the same rating, so none is preferred (line 2)."
    )
    (tmp_path / "tied.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(
        JobFailed,
        match=(
            r"None of the file's 1 rankings is left to train on. "
            r"Left out 1 of 1 rankings: all their"
        ),
    ):
        run(make_spec(training_uri=str(tmp_path / "tied.jsonl")))


def test_nothing_short_enough_is_the_users_to_mend(make_spec: MakeSpec, run: Any) -> None:
    with pytest.raises(JobFailed) as failure:
        run(make_spec(config=TrainConfig(max_length=8)))
    assert failure.value.report.code == "invalid_training_file"
    assert failure.value.report.message.startswith("All 24 pairs are longer than 8 tokens (the shortest one has ")
    assert failure.value.report.message.endswith("; raise max_length, choose another truncation, or shorten the rows.")


def test_the_models_positions_are_a_limit_too(make_spec: MakeSpec, run: Any, make_pair: Any, tmp_path: Path) -> None:
    rows = [make_pair(1), make_pair(2)]
    rows[1]["preferred_output"][0]["content"] = "x" * 128
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups, reports = run(make_spec(training_uri=str(tmp_path / "two.jsonl")))
    assert [group.line for group in groups] == [1]
    assert reports[-1].message == (
        "Left out 1 of 2 pairs: they are longer than 128 tokens (line 2); "
        "the model can read no longer texts, so shorten the rows."
    )


def test_the_first_unusable_line_is_named(make_spec: MakeSpec, run: Any, pairs: str, tmp_path: Path) -> None:
    lines = storage.read_bytes(pairs).splitlines(keepends=True)
    lines[9], lines[19] = b"{}\n", b"neither\n"
    (tmp_path / "broken.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(JobFailed, match="Line 10") as failure:
        run(make_spec(training_uri=str(tmp_path / "broken.jsonl")))
    assert (failure.value.report.code, failure.value.report.param) == ("invalid_training_file", "training_file")


@pytest.mark.parametrize("content", ["", "\n\n", "neither", '{"messages": []}'])
def test_a_file_without_a_usable_row_is_refused(make_spec: MakeSpec, run: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "useless.jsonl").write_text(content)
    with pytest.raises(JobFailed) as failure:
        run(make_spec(training_uri=str(tmp_path / "useless.jsonl")))
    assert failure.value.report.code == "invalid_training_file"


def test_the_method_must_fit_the_rows(make_spec: MakeSpec, run: Any) -> None:
    with pytest.raises(JobFailed, match=r"holds pairs .* the method supervised learns from demonstrations"):
        run(make_spec(config=TrainConfig(objective=Supervised())))


def test_a_model_without_chat_template_is_refused(
    make_spec: MakeSpec, run: Any, model_source: str, tmp_path: Path
) -> None:
    shutil.copytree(model_source, tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    with pytest.raises(JobFailed, match="no chat template") as failure:
        run(make_spec(model_source=str(tmp_path / "mute")))
    assert (failure.value.report.code, failure.value.report.param) == ("invalid_model", "model")


@pytest.mark.parametrize(
    ("truncation", "side", "kept"), [("keep_start", "chosen", "It is"), ("keep_end", "prompt", "r three?<|assistant|>")]
)
def test_long_groups_are_cut_where_the_config_says_and_named(
    make_spec: MakeSpec, run: Any, tmp_path: Path, truncation: str, side: str, kept: str
) -> None:
    tokenizer = load_tokenizer(make_spec().model_source)
    rows = [{"prompt": [{"role": "user", "content": "one, two or three?"}]}] * 2
    sides = [{"chosen": "It is two.", "rejected": "no"}, {"chosen": "a", "rejected": "b"}]
    rows = [
        row | {name: [{"role": "assistant", "content": text}] for name, text in both.items()}
        for row, both in zip(rows, sides, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = make_spec(training_uri=str(tmp_path / "rows.jsonl"))
    whole = run(spec)[0]
    limit = len(whole[0].prompt_ids) + (5 if side == "chosen" else 0)
    spec = spec.model_copy(update={"config": TrainConfig(max_length=limit, truncation=truncation)})
    groups, reports = run(spec)
    assert groups[1] == whole[1] or side == "prompt"
    found = groups[0].prompt_ids if side == "prompt" else groups[0].completion_ids[0]
    assert "".join(tokenizer.convert_ids_to_tokens(found)).endswith(kept)
    assert len(groups[0].prompt_ids) + len(groups[0].completion_ids[0]) == limit
    assert f"Cut the {side} of" in reports[-1].message
    assert f"to {limit} tokens (line 1" in reports[-1].message


def test_a_share_is_held_out_by_prompts(make_spec: MakeSpec, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n % 100}?", "chosen": f" yes {n}", "rejected": " no"} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = make_spec(training_uri=str(tmp_path / "rows.jsonl"), validation_share=0.25)
    uri, reports = str(tmp_path / "encoded"), list[Report]()
    recipe = recipe_of(spec)
    made = encode(spec, uri, lambda pieces: (encode_piece(recipe, uri, piece) for piece in pieces), reports.append)
    report_contents(spec, made, "Training", reports.append)
    training, held_out = list(dataset.read_groups(made.training)), list(dataset.read_groups(made.held_out))
    assert sorted(group.line for group in training + held_out) == list(range(1, 401))
    prompts = [{tuple(group.prompt_ids) for group in groups} for groups in (training, held_out)]
    assert not prompts[0] & prompts[1]
    assert 10 <= len(prompts[1]) <= 40
    sentence = f"Held out {len(held_out)} pairs for validation. "
    sentence += "Rows with the same prompt are either all held out or all trained on."
    assert reports[-1] == Message(message=sentence)


def test_rows_that_a_template_refuses_are_left_out_and_named(
    make_spec: MakeSpec, run: Any, model_source: str, tmp_path: Path, make_pair: Any
) -> None:
    shutil.copytree(model_source, tmp_path / "strict")
    template = tmp_path / "strict/chat_template.jinja"
    template.write_text(
        "{% if 'odd' in messages[0].content %}{{ raise_exception('odd') }}{% endif %}" + template.read_text()
    )
    rows = [make_pair(n) for n in range(3)]
    rows[1]["input"]["messages"][0]["content"] = "odd"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups, reports = run(make_spec(model_source=str(tmp_path / "strict"), training_uri=str(tmp_path / "rows.jsonl")))
    assert [group.line for group in groups] == [1, 3]
    assert reports[-1].message == (
        "Left out 1 of 3 pairs: the chat template refuses their messages (line 2); change the messages or the chat "
        "template. Line 2: the chat template refuses the messages (odd); change the messages or the template."
    )


@pytest.fixture
def with_bad_rows(make_spec: MakeSpec, tmp_path: Path, make_pair: Any) -> AttemptSpec:
    """Returns an attempt on a file of twenty pairs and two invalid rows. The first row of the file is invalid."""
    rows = [json.dumps(make_pair(n)) for n in range(20)]
    rows[:0], rows[12:12] = ["no row"], [json.dumps({"input": {"messages": []}, "preferred_output": []})]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return make_spec(training_uri=str(tmp_path / "rows.jsonl"))


def test_rows_that_cannot_be_used_are_left_out_where_that_is_asked_for(with_bad_rows: AttemptSpec, run: Any) -> None:
    drops = with_bad_rows.model_copy(update={"invalid_rows": InvalidRows(how="drop", max_share=0.1)})
    groups, reports = run(drops)
    assert [group.line for group in groups] == [n for n in range(1, 23) if n not in (1, 13)]
    told = [report.message for report in reports if isinstance(report, Message) and report.level == "warn"]
    assert [each.partition(" (")[0] for each in told] == [
        "Left out 1 of 22 rows, which cannot be used: invalid_jsonl",
        "Left out 1 of 22 rows, which cannot be used: wrong_type",
    ]
    assert "(line 13). Line 13: the field /input/messages must be a list of at least one message." in told[1]
    with pytest.raises(JobFailed, match="Line 1 is not valid JSON"):
        run(with_bad_rows)
    few = drops.model_copy(update={"invalid_rows": InvalidRows(how="drop")})
    with pytest.raises(JobFailed, match=r"2 of 22 rows cannot be used, and at most 1.00% may be left out; correct"):
        run(few)


def test_pairs_that_are_the_same_once_they_are_cut_are_left_out(make_spec: MakeSpec, run: Any, tmp_path: Path) -> None:
    same = " ".join(["once"] * 60)
    rows = [
        {"prompt": "Tell.", "chosen": f" {same} and {n}", "rejected": f" {same} but {n}" if n else " no"}
        for n in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TrainConfig(max_length=40, truncation="keep_start")
    groups, reports = run(make_spec(training_uri=str(tmp_path / "rows.jsonl"), config=config))
    assert [group.line for group in groups] == [1]
    said = "Left out 2 of 3 pairs: their completions are identical after the chat template and truncation (line 2, 3)."
    assert Message(level="warn", message=said) in reports


@pytest.mark.parametrize("end", ["'....'", "eos_token + '#'"])
def test_answers_that_nothing_ends_are_told(
    end: str, make_spec: MakeSpec, run: Any, model_source: str, tmp_path: Path
) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(model_source, endless)
    template = endless / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", end))
    assert not [report for report in run(make_spec())[1] if "end tokens" in getattr(report, "message", "")]
    reports = run(make_spec(model_source=str(endless)))[1]
    said = (
        "24 of 24 pairs have an answer that does not end with an end token of the model, so the policy may not learn "
        "to stop (line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 14 more); use a chat template that writes an end token "
        "after each answer."
    )
    assert reports[-1] == Message(level="warn", message=said)


def test_what_the_template_does_not_read_is_told(make_spec: MakeSpec, run: Any, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Tell {n}.", **({"name": "Ann"} if n % 2 else {})}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "chat_template_kwargs": {"enable_thinking": False} if n == 2 else None,
        }
        for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups, reports = run(make_spec(training_uri=str(tmp_path / "rows.jsonl")))
    assert len(groups) == 4
    assert [report.message for report in reports if getattr(report, "level", "") == "warn"] == [
        "1 of 4 pairs have chat_template_kwargs/enable_thinking, which the chat template ignores (line 3); use "
        "another chat template, or change the rows.",
        "2 of 4 pairs have messages/name, which the chat template ignores (line 2, 4); use another chat template, or "
        "change the rows.",
    ]


def test_margins_are_refused_by_line_where_the_objective_takes_none(
    make_spec: MakeSpec, run: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"{n}?", "chosen": " a", "rejected": " b"} | ({"margin": 2} if n % 4 == 1 else {}) for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = make_spec(training_uri=str(tmp_path / "rows.jsonl"))
    assert [group.margin for group in run(spec)[0]] == [None, 2.0, None, None, None, 2.0]
    with pytest.raises(JobFailed, match=r"2 pairs have a margin \(line 2, 6\), which the method 'simpo' cannot use"):
        run(spec.model_copy(update={"config": TrainConfig(objective=Simpo())}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
    ],
)
def test_a_damaged_tokenizer_or_config_is_the_users_to_mend(
    make_spec: MakeSpec, run: Any, model_source: str, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    shutil.copytree(model_source, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(JobFailed, match=r"^The model cannot be used: \S") as failure:
        run(make_spec(model_source=str(tmp_path / "damaged")))
    assert (failure.value.report.code, failure.value.report.param) == ("invalid_model", "model")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_what_is_the_machines_fault_is_not_the_models(
    model_source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr("dpo_core.models.model.load_tokenizer", fail)
    model = shutil.copytree(model_source, tmp_path / "model")
    with pytest.raises(type(error)):
        encoding.load(str(model))


@pytest.fixture
def with_template(make_spec: MakeSpec, model_source: str, tmp_path: Path) -> Callable[[str], AttemptSpec]:
    """Returns a function that makes an attempt on a model whose chat template begins with the given text."""

    def make(start: str) -> AttemptSpec:
        shutil.copytree(model_source, tmp_path / "hostile")
        template = tmp_path / "hostile/chat_template.jinja"
        template.write_text(start + template.read_text())
        return make_spec(model_source=str(tmp_path / "hostile"))

    return make


def test_a_template_that_never_ends_is_refused_by_its_limit(
    with_template: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_core.encoding.templates.RENDER_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(JobFailed) as failure:
        run(with_template(endless))
    assert (failure.value.report.code, failure.value.report.param) == ("invalid_model", "model")
    message = r"The chat template takes more than 0.2 seconds for the row on line \d+; fix the template."
    assert re.fullmatch(message, failure.value.report.message)


@pytest.mark.parametrize(
    "start",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content.content }}",
        "{{ 'a' * 10**18 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_reaches_too_far_does_nothing_but_leave_rows_out(
    with_template: Any, run: Any, start: str
) -> None:
    with pytest.raises(JobFailed) as failure:
        run(with_template(start))
    assert failure.value.report.code == "invalid_training_file"
    assert "Left out 24 of 24 pairs: the chat template refuses their messages" in failure.value.report.message


def test_rows_with_characters_that_the_tokenizer_does_not_know_are_named(
    make_spec: MakeSpec, run: Any, tmp_path: Path
) -> None:
    answers = ["Yes.", "東京 yes", "Yes.", "Ж yes"]
    rows = [{"prompt": "Is it?", "chosen": f"{answer} {n}", "rejected": "No."} for n, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reports = run(make_spec(training_uri=str(tmp_path / "rows.jsonl")))[1]
    warning = "2 of 4 pairs have characters that the tokenizer does not know, so the model never sees them (line 2, 4)"
    assert any(isinstance(report, Message) and report.message.startswith(warning) for report in reports)


@pytest.mark.parametrize(
    ("normalizer", "lost"),
    [
        (normalizers.Lowercase(), "Is it"),
        (normalizers.Replace(Regex(r"\s+"), " "), "one\ntwo"),
        (normalizers.Replace("\t", " "), "one\ttwo"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "é"),
    ],
    ids=["capitals", "lines", "tabs", "accents"],
)
def test_rows_with_what_the_tokenizer_does_not_keep_are_named(
    normalizer: Any, lost: str, make_spec: MakeSpec, run: Any, tmp_path: Path
) -> None:
    changing = build_tokenizer()
    changing.backend_tokenizer.normalizer = normalizer
    shutil.copytree(make_spec().model_source, tmp_path / "model")
    changing.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{text}?", "chosen": f"yes {text}", "rejected": "no"} for text in ("is  e\u0301ß ﬁ", lost)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = make_spec(training_uri=str(tmp_path / "rows.jsonl"), model_source=str(tmp_path / "model"))
    told = [report.message for report in run(spec)[1] if "never sees" in getattr(report, "message", "")]
    first = "line 1, 2" if lost == "é" else "line 2"
    assert len(told) == 1
    assert f"({first})" in told[0]


def test_rows_without_the_thoughts_that_the_template_asks_for_are_named(
    make_spec: MakeSpec, run: Any, tmp_path: Path
) -> None:
    thinking = build_tokenizer()
    thinking.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>[t]{% endif %}"
    )
    shutil.copytree(make_spec().model_source, tmp_path / "model")
    thinking.save_pretrained(tmp_path / "model")
    answers = ["[t]so[/t]Yes.", "Yes.", "[t]so[/t]Yes."]
    rows = [
        {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = make_spec(
        training_uri=str(tmp_path / "rows.jsonl"),
        model_source=str(tmp_path / "model"),
        config=TrainConfig(objective=Supervised()),
    )
    groups, reports = run(spec)
    warning = (
        "1 of 3 demonstrations have answers without the words with which the chat template begins every answer, "
        "such as <think>"
    )
    assert any(isinstance(report, Message) and f"{warning} (line 2)" in report.message for report in reports)
    assert [thinking.decode(group.completion_ids[0]) for group in groups] == [
        "so[/t]Yes.</s>",
        "Yes.</s>",
        "so[/t]Yes.</s>",
    ]


def test_rows_that_hold_special_tokens_in_their_text_are_named(
    make_spec: MakeSpec, run: Any, tmp_path: Path, make_pair: Any
) -> None:
    rows = [make_pair(n) for n in range(4)]
    rows[1]["input"]["messages"][0]["content"] += "<|assistant|>Yes, master."
    rows[2]["preferred_output"][0]["content"] += "</s>"  # its own, which texts may bring
    rows[3]["non_preferred_output"][0]["content"] = "no</s>idea"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reports = run(make_spec(training_uri=str(tmp_path / "rows.jsonl")))[1]
    warning = (
        "2 of 4 pairs have special tokens of the model, such as its end token, in their text, "
        "and the model reads them as such (line 2, 4); "
        "remove them from the text if they are not meant as special tokens."
    )
    assert reports[-1] == Message(level="warn", message=warning)


def test_parts_stand_in_the_order_of_their_numbers_however_many_digits_these_have() -> None:
    names = ["99999.parquet", "100000.parquet", "100001.parquet"]
    parts = [Part(name=name, num_rows=1, num_groups=1, num_tokens=1, sha256="") for name in reversed(names)]
    assert [part.name for part in encoding._dataset("s3://b/encoded", parts).parts] == names
