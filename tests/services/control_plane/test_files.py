"""/v1/files, with the unmodified client."""

import openai
import pytest

from tests.services.control_plane.conftest import pair, pairs


def test_an_upload_is_processed_listed_read_back_and_deleted(client: openai.OpenAI) -> None:
    created = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    assert client.files.wait_for_processing(created.id).status == "processed"
    assert created.bytes == len(pairs())
    assert created.id in [file.id for file in client.files.list(limit=2)]
    assert client.files.content(created.id).read() == pairs()
    assert client.files.delete(created.id).deleted
    with pytest.raises(openai.NotFoundError, match=created.id):
        client.files.retrieve(created.id)


def test_a_broken_line_is_refused_by_its_number_and_what_is_wrong(client: openai.OpenAI) -> None:
    lines = [pair(number) for number in range(12)]
    lines[6] = b'{"input": {"messages": []}'
    with pytest.raises(openai.BadRequestError, match="Line 7") as refused:
        client.files.create(file=("pairs.jsonl", b"\n".join(lines)), purpose="fine-tune")
    assert refused.value.param == "file"
    lines[6] = pair(6).replace(b"preferred_output", b"preferred", 1)
    with pytest.raises(openai.BadRequestError, match=r"Line 7.*preferred"):
        client.files.create(file=("pairs.jsonl", b"\n".join(lines)), purpose="fine-tune")


def test_pages_follow_each_other_in_both_orders_without_repeating(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}.jsonl", pairs()), purpose="fine-tune").id for i in range(5)]
    ours = [file.id for file in client.files.list(limit=2, order="asc") if file.id in made]
    assert ours == made
    assert [file.id for file in client.files.list(limit=2, order="desc") if file.id in made] == made[::-1]


def test_a_cursor_that_names_nothing_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(after="file-none")
    assert refused.value.param == "after"


def test_other_purposes_are_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'") as refused:
        client.files.create(file=("a.jsonl", pairs()), purpose="batch")
    assert refused.value.code == "unsupported_value"


def test_a_file_that_a_live_job_needs_stays(client: openai.OpenAI) -> None:
    files = [client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id for _ in range(2)]
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=files[0], validation_file=files[1], method={"type": "dpo"}
    )
    for file_id in files:
        with pytest.raises(openai.BadRequestError, match=job.id):
            client.files.delete(file_id)
    client.fine_tuning.jobs.cancel(job.id)
    assert all(client.files.delete(file_id).deleted for file_id in files)


TEXTS = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
HOSTILE = {
    "broken UTF-8": (b'{"prompt": "\xff"}', "Line 2 is not UTF-8"),
    "NUL": (b'{"prompt": "a\\u0000b"}', "Line 2, /prompt: holds a NUL"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d"}', "Line 2, /prompt: holds half of a surrogate pair"),
    "nesting": (b'{"prompt": ' + b"[" * 10**5, "Line 2 nests more than 64 levels"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', "Line 2, /prompt: this key stands twice"),
    "NaN": (b'{"prompt": NaN}', "Line 2, /prompt: NaN is not a JSON number"),
    "a long line": (b"x" * (33 * 2**20), "Line 2 is longer than 32 MiB"),
    "a long key": (b'{"' + b"k" * 10**6 + b'": 1}', "Line 2: its keys are kkk"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_is_refused_by_line_in_a_short_message(client: openai.OpenAI, name: str) -> None:
    row, says = HOSTILE[name]
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        client.files.create(file=("hostile.jsonl", TEXTS + row), purpose="fine-tune")
    assert refused.value.param == "file"
    assert len(refused.value.message) < 1500


def test_every_kind_of_problem_is_counted_in_a_short_message(client: openai.OpenAI) -> None:
    rows = b"\n".join(row for row, _ in HOSTILE.values())
    with pytest.raises(
        openai.BadRequestError, match=r"Line 2 is not UTF-8.* rows cannot be used: 1 invalid_utf8"
    ) as refused:
        client.files.create(file=("hostile.jsonl", TEXTS + rows), purpose="fine-tune")
    assert len(refused.value.message) < 2000


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(client: openai.OpenAI, content: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match="holds no rows"):
        client.files.create(file=("empty.jsonl", content), purpose="fine-tune")


def test_harmless_oddities_are_taken_and_reported(client: openai.OpenAI) -> None:
    same = TEXTS.replace(b'"c"', b'"b"').strip() + b"\r\n"
    stored = client.files.create(file=("odd.jsonl", b"\xef\xbb\xbf" + same), purpose="fine-tune")
    report = stored.model_extra["x_raydpo"]["report"]  # type: ignore[index]
    assert (report["num_rows"], report["num_identical"], report["problems"]) == (1, 1, [])
