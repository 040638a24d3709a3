import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_core.config import TrainConfig
from services import spool, storage
from services.contract import LONGEST_TEXT, WIRE, AttemptSpec, Failed, Message, Progress, Report
from services.training import driver
from services.training.reports import reporting
from services.training.reports.reporting import Reporter, progress
from tests.conftest import Disk


@pytest.fixture
def spec(tmp_path: Path, control_plane: Any) -> AttemptSpec:
    return AttemptSpec(
        job_id="ftjob-1",
        attempt=2,
        config=TrainConfig(),
        num_workers=1,
        training_uri="",
        model_source="",
        run_uri=(tmp_path / "run").as_uri(),
        cache_uri=str(tmp_path / "cache"),
        events_url=control_plane.url,
    )


def until(condition: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def spooled(reporter: Reporter) -> list[int]:
    segments = storage.list_uris(reporter.spool_uri)
    batches = [spool.read(uri) for uri in segments]
    for uri, batch in zip(segments, batches, strict=True):
        assert uri.endswith(f"/spool/2/{batch.events[0].seq:08d}.json")
    return [event.seq for batch in batches for event in batch.events]


def test_every_report_is_spooled_and_shipped_once_in_order(spec: AttemptSpec, control_plane: Any) -> None:
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    for number in range(1200):
        reporter.report(Message(message=str(number)))
    until(lambda: len(control_plane.seqs()) == 1200)
    reporter.report(Message(message="last"))
    assert reporter.close(timeout_seconds=10)
    assert spooled(reporter) == control_plane.seqs() == list(range(1201))
    assert sum(len(batch.events) for batch in control_plane.posts) == 1201
    assert control_plane.tokens == {f"Bearer {control_plane.token}"}


def test_the_token_of_a_launch_is_given_away_for_one_that_nobody_knows_also_where_the_answer_is_lost(
    spec: AttemptSpec, control_plane: Any
) -> None:
    control_plane.script = [None, 409]  # the exchange is done, its answer lost, and the launch's token refused
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    reporter.report(Message(message="one"))
    until(lambda: len(control_plane.posts) == 2)
    reporter.report(Message(message="two"))
    assert reporter.close(timeout_seconds=10)
    assert control_plane.seqs() == [0, 1]
    (own,) = control_plane.tokens - {f"Bearer {control_plane.token}"}
    assert own == f"Bearer {control_plane.own_tokens.pop()}"
    assert not control_plane.own_tokens


@pytest.mark.slow
def test_dropped_answers_and_errors_are_retried_until_all_arrived(spec: AttemptSpec, control_plane: Any) -> None:
    control_plane.script = [None, 503, 401, 200, None]
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    for number in range(5):
        reporter.report(Message(message=str(number)))
        reporter.flush()
    assert reporter.close(timeout_seconds=30)
    assert control_plane.seqs() == spooled(reporter) == list(range(5))
    assert len(control_plane.posts) == 7, "two posts were taken and their answers dropped: each is sent again"


def test_a_control_plane_that_is_away_delays_nothing_and_the_spool_keeps_all(
    spec: AttemptSpec, control_plane: Any
) -> None:
    spec = spec.model_copy(update={"events_url": "http://127.0.0.1:9/events"})
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    started = time.monotonic()
    for number in range(100):
        reporter.report(Message(message=str(number)))
    assert not reporter.close(timeout_seconds=0.5)
    assert time.monotonic() - started < 30  # a report that waited for an answer would take half a second, each
    assert spooled(reporter) == list(range(100))


def test_a_fenced_attempt_learns_it_and_ships_no_more(spec: AttemptSpec, control_plane: Any) -> None:
    control_plane.script = [409, 409]  # as to its launch's token, so to its own
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    reporter.report(Message(message="too late"))
    until(lambda: reporter.command() == "fenced")
    reporter.report(Message(message="much too late"))
    assert not reporter.close(timeout_seconds=10)
    assert control_plane.posts == []


@pytest.mark.slow
def test_an_attempt_with_nothing_to_say_beats_and_learns_what_is_wished(spec: AttemptSpec, control_plane: Any) -> None:
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    control_plane.desired = "pause"
    until(lambda: reporter.command() == "pause")
    assert reporter.beat() == ("pause", True)
    control_plane.desired = "run"
    until(lambda: reporter.beat() == ("run", True))
    reporter.pause()
    assert reporter.command() == "pause"
    assert reporter.close(timeout_seconds=10)
    assert len(control_plane.posts) >= 2
    assert control_plane.seqs() == []
    assert not storage.list_uris(reporter.spool_uri)


def test_an_attempt_whose_driver_is_silent_has_no_heartbeat(
    spec: AttemptSpec, control_plane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(reporting, "DRIVER_SECONDS", 0.3)
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    until(lambda: control_plane.posts)
    time.sleep(0.5)
    beats = len(control_plane.posts)
    time.sleep(0.3)
    assert len(control_plane.posts) == beats
    reporter.beat()
    until(lambda: len(control_plane.posts) > beats)
    reporter.close(timeout_seconds=0)


def test_an_attempt_that_cannot_reach_the_control_plane_beats_in_its_spool(
    spec: AttemptSpec, control_plane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(reporting, "UNHEARD_SECONDS", 0.1)
    control_plane.default = 503
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    until(lambda: storage.list_uris(reporter.spool_uri))
    control_plane.default = 200
    until(lambda: control_plane.reports())
    assert {report.kind for report in control_plane.reports()} == {"alive"}
    assert reporter.close(timeout_seconds=10)


def test_a_disk_that_fails_loses_no_report(spec: AttemptSpec, control_plane: Any, tmp_path: Path) -> None:
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    (tmp_path / "run").write_text("the disk fails")
    reporter.report(Message(message="one"))
    with pytest.raises(OSError, match="run"):
        reporter.flush()
    reporter.report(Message(message="two"))
    (tmp_path / "run").unlink()
    until(lambda: storage.list_uris(reporter.spool_uri))
    assert reporter.close(timeout_seconds=10)
    assert spooled(reporter) == [0, 1]


def test_how_long_the_storage_took_no_reports_is_told_when_it_takes_them_again(
    spec: AttemptSpec,
    control_plane: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(reporting, "SENTENCE_SECONDS", 0.0)
    reporter = Reporter(spec, control_plane.token, period_seconds=0.01)
    (tmp_path / "run").write_text("the disk fails")
    reporter.report(Message(message="one"))
    until(lambda: "could not be written" in caplog.text)
    (tmp_path / "run").unlink()
    until(lambda: len(control_plane.reports()) == 2)
    one, late = control_plane.reports()
    assert (one.message, late.level) == ("one", "warn")
    assert late.message.startswith("The storage took no reports for ")
    assert reporter.close(timeout_seconds=10)


def test_a_full_disk_loses_no_report(spec: AttemptSpec, control_plane: Any, small_disk: Disk) -> None:
    spec = spec.model_copy(update={"run_uri": (small_disk.folder / "run").as_uri()})
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    reporter.report(Message(message="one"))
    reporter.flush()
    small_disk.fill()
    reporter.report(Message(message="two"))
    with pytest.raises(OSError, match="No space left"):
        reporter.flush()
    reporter.report(Message(message="three"))
    time.sleep(0.3)
    assert spooled(reporter) == [0]
    small_disk.make_room()
    assert reporter.close(timeout_seconds=10)
    assert spooled(reporter) == control_plane.seqs() == [0, 1, 2]


def test_a_segment_whose_bits_flipped_is_not_shipped_and_holds_nothing_up(
    spec: AttemptSpec, control_plane: Any
) -> None:
    control_plane.default = 503
    reporter = Reporter(spec, control_plane.token, period_seconds=0.05)
    for number in range(3):
        reporter.report(Message(message=f"number {number}"))
        reporter.flush()
    _, segment, _ = map(storage.fetch, storage.list_uris(reporter.spool_uri))
    segment.write_bytes(segment.read_bytes().replace(b"number 1", b"number 3"))
    control_plane.default = 200
    assert reporter.close(timeout_seconds=10)
    assert control_plane.reports() == [Message(message="number 0"), Message(message="number 2")]


def test_an_attempt_number_is_used_once(spec: AttemptSpec, control_plane: Any) -> None:
    reporter = Reporter(spec, control_plane.token)
    reporter.report(Message(message="one"))
    reporter.close(timeout_seconds=10)
    with pytest.raises(FileExistsError, match="Attempt 2 was started before"):
        Reporter(spec, control_plane.token)


def test_text_that_is_no_unicode_is_told_as_far_as_it_is(spec: AttemptSpec, control_plane: Any) -> None:
    reporter = Reporter(spec, control_plane.token)
    reporter.report(Message(message="half \ud800 a face"))
    reporter.report(Failed(code="c", message="a\0b"))
    assert reporter.close(timeout_seconds=10)
    assert control_plane.reports() == [Message(message="half ? a face"), Failed(code="c", message="a\ufffdb")]


def test_long_reports_are_shipped_in_posts_that_the_control_plane_takes(spec: AttemptSpec, control_plane: Any) -> None:
    reporter = Reporter(spec, control_plane.token)
    for number in range(300):
        reporter.report(Message(message=f"{number} {'ü' * LONGEST_TEXT}"))
    assert reporter.close(timeout_seconds=30)
    assert control_plane.seqs() == list(range(300))
    assert max(len(batch.model_dump_json()) for batch in control_plane.posts) < 2**19


def test_a_report_that_cannot_be_written_fails_its_reporter_and_leaves_no_gap(
    spec: AttemptSpec, control_plane: Any
) -> None:
    reporter = Reporter(spec, control_plane.token)
    with pytest.raises(ValueError, match="surrogate"):
        reporter.report(Progress(stage="\ud800", done=0, total=1))
    reporter.report(Message(message="fine"))
    reporter.close(timeout_seconds=10)
    assert spooled(reporter) == [0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"wire": WIRE + 1, "config": "unlike any before"}, f"its format has version {WIRE + 1}, and the image reads"),
        ({"num_workers": "many"}, "num_workers: Input should be a valid integer"),
    ],
    ids=["newer", "unreadable"],
)
def test_a_driver_of_another_release_says_that_it_cannot_read_its_spec(
    spec: AttemptSpec, control_plane: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any, why: str
) -> None:
    monkeypatch.setenv(driver.TOKEN_VARIABLE, control_plane.token)
    uri = (tmp_path / "spec.json").as_uri()
    storage.write_bytes(uri, json.dumps(json.loads(spec.model_dump_json()) | change).encode())
    assert driver.main(uri) == 1
    (report,) = control_plane.reports()
    assert (report.kind, report.code, why in report.message) == ("failed", "release_mismatch", True)


def test_progress_is_told_in_a_sentence_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now)
    reports: list[Report] = []
    done = progress(reports.append, "scoring", 100, start=10)
    for number in range(11, 101):
        now += 4
        done(number)
    assert [report.done for report in reports if isinstance(report, Progress)] == list(range(10, 101))
    assert [report.message for report in reports if isinstance(report, Message)][:2] == [
        "Scoring: 25 of 100 (25%) done, about 5 minutes left.",
        "Scoring: 40 of 100 (40%) done, about 4 minutes left.",
    ]
