"""Tests whole attempts (runs of a job). The job's main program, the driver, is started as Ray Jobs starts it.

Drivers run on a Ray cluster of these tests, and are killed and started again.
"""

import gzip
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_core.config import Optim, TrainConfig
from dpo_core.models.model import load_policy
from dpo_core.options import Dpo, Objective, Orpo
from dpo_core.training.checkpoint import verify
from services import storage
from services.contract import (
    Adapter,
    AttemptSpec,
    CheckpointSaved,
    Died,
    Failed,
    Integrations,
    Message,
    Mlflow,
    Paused,
    Progress,
    ReferenceReleased,
    ReferenceWanted,
    Started,
    StepMetrics,
    Succeeded,
    Wandb,
    WandbIntegration,
)
from services.deaths import cause_in
from services.training.data import cache
from services.training.preparation import engine_rate_uri
from services.training.reference import rates
from services.training.reference.rates import Rate
from services.training.reports.logs import LEFT_OUT, blank, patterns_of
from tests.conftest import Disk
from tests.dpo_core.conftest import build_mixture
from tests.services.training.attempt import Driver, figures, only, ray_processes, train_workers
from tests.services.training.conftest import ray_cluster
from tests.services.web import running_web

pytestmark = pytest.mark.ray

MakeSpec = Callable[..., AttemptSpec]
CONFIG = TrainConfig(
    batch_size=4, n_epochs=40, checkpoint_steps=40, optim=Optim(learning_rate=1e-3)
)  # 240 steps of milliseconds: long enough to be killed in
NUM_STEPS = 240
FROZEN_SECONDS = 5.0
TO_TRAIN = ["waiting for workers", "loading policy"]  # stages before the first step


@pytest.fixture(scope="module")
def uninterrupted(
    make_spec_in: MakeSpec,
    tmp_path_factory: pytest.TempPathFactory,
    ray_environment: dict[str, str],
    lasting_control_plane: Any,
) -> Driver:
    """Returns an attempt that ran from its beginning to its end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    spec = make_spec_in(folder, config=CONFIG, reference="tiny", events_url=lasting_control_plane.url)
    driver = Driver(spec, ray_environment, lasting_control_plane.token)
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    assert lasting_control_plane.reports() == driver.reports()
    return driver


def test_an_attempt_reports_all_its_stages_and_exports_the_policy(uninterrupted: Driver, model_source: str) -> None:
    reports, run_uri = uninterrupted.reports(), uninterrupted.spec.run_uri
    stages = list(dict.fromkeys(report.stage for report in only(Progress, reports)))
    assert stages == ["encoding", "scoring", *TO_TRAIN, "exporting"]
    messages = [report.message for report in only(Message, reports)]
    assert messages[0] == "Training file has 24 pairs (OpenAI preference format)."
    assert messages[1].startswith("Average number of tokens: prompt 19")
    assert messages[2].startswith(
        "vLLM and the trainer compute the same log-probabilities of the reference model: differences in 24 rows with "
    )
    assert messages[3].startswith("The first loss is 0.69314")
    (started,) = only(Started, reports)
    assert (started.num_groups, started.total_steps, started.resumed_from) == (24, NUM_STEPS, 0)
    assert list(figures(reports)) == list(range(1, NUM_STEPS + 1))
    assert figures(reports)[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert figures(reports)[NUM_STEPS]["loss"] < 0.1
    saved = only(CheckpointSaved, reports)
    assert [checkpoint.step for checkpoint in saved] == [40, 80, 120, 160, 200, 240]
    assert reports[-1] == Succeeded(model_uri=f"{run_uri}/export", trained_tokens=reports[-1].trained_tokens)
    exported, start = (load_policy(source) for source in (storage.fetch(f"{run_uri}/export"), model_source))
    last = load_policy(storage.fetch(f"{saved[-1].uri}/model"))
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), last.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(exported.parameters(), start.parameters(), strict=True))


def kept_log(driver: Driver, source: str) -> str:
    folder = storage.join(driver.spec.run_uri, "logs", str(driver.spec.attempt), source)
    return b"".join(storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)).decode()


def test_what_driver_and_workers_print_is_kept_without_the_attempts_token(
    uninterrupted: Driver, lasting_control_plane: Any
) -> None:
    assert storage.list_folders(storage.join(uninterrupted.spec.run_uri, "logs", "1")) == ["driver", "worker-0"]
    for source in ("driver", "worker-0"):
        assert lasting_control_plane.token not in kept_log(uninterrupted, source)
    printed = [blank(line, patterns_of({})) for line in uninterrupted.log.read_bytes().splitlines()]
    last = [line.decode() for line in printed if not line.startswith(LEFT_OUT)][-1]
    # The last words are written a moment after the driver has ended.
    deadline = time.monotonic() + 30
    while kept_log(uninterrupted, "driver").splitlines()[-1] != last:
        assert time.monotonic() < deadline, (kept_log(uninterrupted, "driver")[-2000:], last)
        time.sleep(0.2)


def test_a_killed_attempt_is_continued_by_the_next_bit_for_bit(
    uninterrupted: Driver,
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    ray_environment: dict[str, str],
) -> None:
    spec = make_spec(config=CONFIG, reference="tiny", events_url=control_plane.url)
    first = start(spec)
    first.reported(CheckpointSaved)
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    prepared = storage.read_bytes(f"{spec.run_uri}/prepared/manifest.json")

    second = start(spec.model_copy(update={"attempt": 2}))
    assert second.wait() == 0, second.log.read_text()[-5000:]
    before, after = first.reports(), second.reports()
    (started,) = only(Started, after)
    assert 0 < started.resumed_from < NUM_STEPS
    assert Message(message=f"Training resumes from the checkpoint of step {started.resumed_from}.") in after
    assert only(CheckpointSaved, after)[0].step == started.resumed_from, "its first report may have been lost"
    assert list(figures(after)) == list(range(started.resumed_from + 1, NUM_STEPS + 1))
    assert set(figures(before)) >= set(range(1, started.resumed_from + 1)), "what is not run again was spooled"
    assert figures(before) | figures(after) == figures(uninterrupted.reports())
    for step, found in figures(before).items():
        assert found == figures(uninterrupted.reports())[step]
    assert after[-1].trained_tokens == uninterrupted.reports()[-1].trained_tokens
    assert storage.read_bytes(f"{spec.run_uri}/prepared/manifest.json") == prepared
    assert not [report for report in only(Progress, after) if report.stage in ("encoding", "scoring")]
    assert not list(Path(ray_environment["TMPDIR"]).glob("raydpo-ftjob-1-*")), "checkpoints left in scratch"


def test_a_killed_attempt_and_the_next_are_one_run_wherever_the_job_is_followed(
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    ray_environment: dict[str, str],
) -> None:
    followed = Integrations(
        tensorboard=True,
        mlflow=Mlflow(experiment="dpo"),
        wandb=(WandbIntegration(type="wandb", wandb=Wandb(project="dpo")),),
    )
    spec = make_spec(config=CONFIG, reference="tiny", events_url=control_plane.url, integrations=followed)
    first = start(spec)
    first.reported(CheckpointSaved)
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    second = start(spec.model_copy(update={"attempt": 2}))
    assert second.wait() == 0, second.log.read_text()[-5000:]
    told = [report for report in only(Message, second.reports()) if "runs/ftjob-1/" in report.message]
    assert {report.message.partition(":")[0] for report in told} == {"TensorBoard", "MLflow", "Weights & Biases"}
    assert {report.level for report in told} == {"info"}
    assert isinstance(second.reports()[-1], Succeeded)

    events = EventAccumulator(str(storage.fetch(f"{spec.run_uri}/tensorboard")), size_guidance={"scalars": 0})
    events.Reload()
    known = figures(first.reports()) | figures(second.reports())
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, NUM_STEPS + 1))
    for event in events.Scalars("train/loss"):
        assert event.value == pytest.approx(known[event.step]["loss"])
    assert storage.exists(f"{spec.run_uri}/wandb/offline-run-ftjob-1/run-ftjob-1.wandb")
    assert storage.exists(f"{spec.run_uri}/mlflow/mlflow.db")
    assert not ray_processes("wandb-core", ray_environment)


def test_an_integration_that_dies_costs_the_job_nothing_but_a_warning(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any, ray_environment: dict[str, str]
) -> None:
    followed = Integrations(tensorboard=True)
    driver = start(make_spec(config=CONFIG, reference="tiny", events_url=control_plane.url, integrations=followed))
    driver.reported(CheckpointSaved)
    (follower,) = ray_processes("ray::Follower", ray_environment)
    follower.kill()
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    (warning,) = [report for report in only(Message, driver.reports()) if report.level == "warn"]
    assert warning.message.startswith(
        "The process that sends metrics to an integration died; the integration lacks the last steps: "
    )
    assert list(figures(driver.reports())) == list(range(1, NUM_STEPS + 1))
    assert isinstance(driver.reports()[-1], Succeeded)


def without_signs(metrics: dict[str, float]) -> dict[str, float]:
    """Returns the metrics without the accuracy. At the first step, margins are about 0, so rounding decides their
    signs."""
    return {key: value for key, value in metrics.items() if key != "rewards/accuracies"}


def test_two_workers_equal_one_even_when_one_of_them_is_killed(
    uninterrupted: Driver,
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    ray_environment: dict[str, str],
) -> None:
    driver = start(make_spec(config=CONFIG, num_workers=2, reference="tiny", events_url=control_plane.url))
    driver.reported(CheckpointSaved)
    workers = train_workers(ray_environment)
    assert len(workers) == 2
    workers[0].kill()
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    first, second = only(Started, driver.reports())
    assert first.resumed_from == 0 < second.resumed_from
    (told,) = [m.message for m in only(Message, driver.reports()) if m.message.startswith("Training workers died")]
    assert re.match(r"Training workers died \(worker [01].*\): one of its processes was killed or crashed", told)
    one, two = figures(uninterrupted.reports()), figures(driver.reports())
    assert list(two) == list(range(1, NUM_STEPS + 1))
    for step in range(1, 41):  # later, float32 sums in another order have grown into another path
        assert without_signs(two[step]) == pytest.approx(without_signs(one[step]), rel=1e-3, abs=1e-3)
    assert two[NUM_STEPS]["rewards/accuracies"] == one[NUM_STEPS]["rewards/accuracies"] == 1


def test_a_worker_that_hangs_is_killed_and_followed_by_another(
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    ray_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ray_environment, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "20")  # and not ten minutes
    driver = start(make_spec(config=CONFIG, num_workers=2, reference="tiny", events_url=control_plane.url))
    driver.reported(CheckpointSaved)
    hangs = train_workers(ray_environment)[0]
    hangs.suspend()
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    assert not hangs.is_running()
    first, second = only(Started, driver.reports())
    assert first.resumed_from == 0 < second.resumed_from
    assert list(figures(driver.reports())) == list(range(1, NUM_STEPS + 1))


def test_processes_that_are_frozen_for_a_while_cost_nothing(
    uninterrupted: Driver,
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    ray_environment: dict[str, str],
) -> None:
    driver = start(make_spec(config=CONFIG, reference="tiny", events_url=control_plane.url))
    driver.reported(CheckpointSaved)
    (reporter,) = ray_processes("ray::Reporter", ray_environment)
    (worker,) = train_workers(ray_environment)
    for frozen in (reporter, worker, driver.fork()):
        frozen.suspend()
        time.sleep(FROZEN_SECONDS)
        assert not only(Succeeded, driver.reports())
        frozen.resume()
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    assert len(only(Started, driver.reports())) == 1
    assert [report.step for report in only(StepMetrics, driver.reports())] == list(range(1, NUM_STEPS + 1))
    assert figures(driver.reports()) == figures(uninterrupted.reports())
    assert control_plane.reports() == driver.reports()


def test_a_full_disk_stops_a_job_until_there_is_room(
    uninterrupted: Driver,
    make_spec_in: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    small_disk: Disk,
    tmp_path: Path,
) -> None:
    (small_disk.folder / "run").mkdir()
    (small_disk.folder / "run" / "1.log").symlink_to(tmp_path / "1.log")  # Ray keeps what is printed elsewhere
    driver = start(make_spec_in(small_disk.folder, config=CONFIG, reference="tiny", events_url=control_plane.url))
    driver.reported(CheckpointSaved)
    small_disk.fill()
    driver.printed("waits until there is room")
    time.sleep(2)
    assert driver.process.poll() is None
    before = whole_checkpoints(driver)
    small_disk.make_room()
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    reports = driver.reports()
    assert before < whole_checkpoints(driver) == {report.step for report in only(CheckpointSaved, reports)}
    (warning,) = [report.message for report in only(Message, reports) if report.level == "warn"]
    assert re.match("The storage is full; publishing the checkpoint at step [0-9]+ waits until there is room", warning)
    assert len(only(Started, reports)) == 1
    assert figures(reports) == figures(uninterrupted.reports())
    assert control_plane.reports() == reports


@pytest.mark.long
@pytest.mark.parametrize("when", ["before the first checkpoint", "while one is published"])
def test_whenever_an_attempt_is_killed_the_next_continues_it_bit_for_bit(
    when: str,
    uninterrupted: Driver,
    make_spec_in: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    ray_environment: dict[str, str],
    small_disk: Disk,
    tmp_path: Path,
) -> None:
    folder = small_disk.folder / when.replace(" ", "-")
    (folder / "run").mkdir(parents=True)
    for attempt in "12":
        (folder / "run" / f"{attempt}.log").symlink_to(tmp_path / f"{attempt}.log")
    spec = make_spec_in(folder, config=CONFIG, reference="tiny", events_url=control_plane.url)
    first = start(spec)
    if when == "while one is published":
        first.reported(CheckpointSaved)
        small_disk.fill(leave=64 * 1024)  # room for its first files
        first.printed("waits until there is room")
    else:
        first.reported(StepMetrics)
    first.process.kill()
    first.wait()
    while train_workers(ray_environment):
        time.sleep(0.05)
    small_disk.make_room()
    whole = whole_checkpoints(first)
    begun = storage.list_folders(storage.join(spec.run_uri, "checkpoints"))
    assert len(begun) > len(whole) or when == "before the first checkpoint"
    second = start(spec.model_copy(update={"attempt": 2}))
    assert second.wait() == 0, second.log.read_text()[-5000:]
    (started,) = only(Started, second.reports())
    assert started.resumed_from == max(whole, default=0)
    assert figures(first.reports()) | figures(second.reports()) == figures(uninterrupted.reports())
    for step, found in figures(first.reports()).items():
        assert found == figures(uninterrupted.reports())[step]


def whole_checkpoints(driver: Driver) -> set[int]:
    """Returns the steps of the complete checkpoints, after a check of their files."""
    folders = storage.fetch(storage.join(driver.spec.run_uri, "checkpoints"))
    return {verify(manifest.parent).step for manifest in folders.glob("*/manifest.json")}


NEIGHBOUR = "import sys; held = bytearray(b'1') * int(sys.argv[1]); sys.stdin.read()"


@pytest.mark.long
def test_a_neighbour_that_takes_the_memory_is_named_and_the_next_attempt_goes_on(
    make_spec: MakeSpec, model_source: str, control_plane: Any
) -> None:
    """Here Ray kills processes when 3 GB more than now are in use, and not when the whole memory is."""
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + 3 * 2**30) / memory.total
    settings = {"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    config = TrainConfig(objective=Orpo(), batch_size=1, n_epochs=50, checkpoint_steps=40)
    spec = make_spec(config=config, events_url=control_plane.url)
    with ray_cluster(model_source, **settings) as environment:
        first = Driver(spec, environment, control_plane.token)
        first.reported(CheckpointSaved)
        command = [sys.executable, "-c", NEIGHBOUR, str(9 * 2**29)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as neighbour:
            assert first.wait() == 1
            neighbour.communicate()
        log = first.log.read_text()
        told = [died.cause for died in only(Died, first.reports())] or [cause_in("\n".join(log.splitlines()[-10:]))]
        assert re.match(r"memory ran out on the node \S+: [\d.]+ GB of [\d.]+ GB were in use", told[0]), log[-5000:]
        second = Driver(spec.model_copy(update={"attempt": 2}), environment, control_plane.token)
        second.reported(Started)
        assert only(Started, second.reports())[0].resumed_from > 0
        second.process.kill()
        second.wait()


@pytest.mark.long
def test_data_whose_bits_flipped_in_the_cache_are_made_again_and_never_trained_on(
    make_spec_in: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any, tmp_path: Path
) -> None:
    config = TrainConfig(batch_size=8, n_epochs=1)
    given = {"config": config, "reference": "tiny", "events_url": control_plane.url}
    found = []
    for number in range(3):
        spec = make_spec_in(tmp_path / str(number), **given, cache_uri=(tmp_path / "cache").as_uri())
        driver = start(spec)
        assert driver.wait() == 0, driver.log.read_text()[-5000:]
        found.append(driver.reports())
        ids, scores = sorted((tmp_path / "cache").rglob("*.parquet"), key=lambda path: len(path.parts))
        damaged = (ids, scores)[number % 2]
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
    for reports, damaged in zip(found[1:], (ids, scores), strict=True):
        (warning,) = [report.message for report in only(Message, reports) if report.level == "warn"]
        assert warning.startswith(
            "The stored result of an earlier preparation of the data is damaged, so the data are prepared again: "
        )
        assert f"{damaged.parent.name}/{damaged.name} with prepared data does not have its recorded sha256" in warning
        assert figures(reports) == figures(found[0])


def test_a_validation_file_is_prepared_alike_and_evaluated_with_every_checkpoint(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any, make_pair: Any, tmp_path: Path
) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(make_pair(n)) + "\n" for n in range(100, 107)))
    config = TrainConfig(batch_size=8, n_epochs=2, checkpoint_steps=2)
    given = {"config": config, "reference": "tiny", "events_url": control_plane.url}
    driver = start(make_spec(**given, validation_uri=str(tmp_path / "held.jsonl")))
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    messages = [report.message for report in only(Message, driver.reports())]
    assert "Validation file has 7 pairs (OpenAI preference format)." in messages
    evaluated = [step for step, metrics in figures(driver.reports()).items() if "eval/loss" in metrics]
    assert evaluated == [2, 4, 6]
    assert all("eval/rewards/margins" in saved.metrics for saved in only(CheckpointSaved, driver.reports()))


def test_a_second_job_on_the_same_bytes_finds_ids_and_scores(
    uninterrupted: Driver, make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any
) -> None:
    given = {"config": CONFIG, "events_url": control_plane.url, "cache_uri": uninterrupted.spec.cache_uri}
    driver = start(make_spec(**given, reference="a-reference-that-never-comes"))
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    messages = [report.message for report in only(Message, driver.reports())]
    assert messages[0] == "Training file: the token ids are known from an earlier job with the same data and model."
    assert messages[1] == "Training file has 24 pairs (OpenAI preference format)."
    assert messages[3] == "The reference model's scores of these rows are known from an earlier job."
    assert [report.stage for report in only(Progress, driver.reports())] == [*TO_TRAIN, "exporting", "exporting"]
    assert figures(driver.reports()) == figures(uninterrupted.reports())


def test_of_two_jobs_at_once_one_prepares(
    make_spec_in: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any, tmp_path: Path
) -> None:
    config, cache = TrainConfig(batch_size=8, n_epochs=1), (tmp_path / "cache").as_uri()
    given = {"config": config, "reference": "tiny", "events_url": control_plane.url, "cache_uri": cache}
    drivers = [start(make_spec_in(tmp_path / name, job_id=f"ftjob-{name}", **given)) for name in "ab"]
    assert [driver.wait() for driver in drivers] == [0, 0], [d.log.read_text()[-3000:] for d in drivers]
    prepared = [{report.stage for report in only(Progress, driver.reports())} for driver in drivers]
    assert sum("encoding" in stages for stages in prepared) == 1
    assert sum("scoring" in stages for stages in prepared) == 1


def test_the_trainer_scores_where_the_deployment_departs(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], other_model_source: str, control_plane: Any
) -> None:
    given = {"reference": "tiny", "reference_source": "auto", "events_url": control_plane.url}
    spec = make_spec(model_source=other_model_source, **given)
    loaded = Rate(tokens_per_second=1e9)
    weights = cache.model_digest(other_model_source, weights=True)
    rates.write(engine_rate_uri(spec.cache_uri, weights, "float32"), loaded)
    driver = start(spec)
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    assert ReferenceWanted(app_name="tiny") in driver.reports()
    warnings = [report.message for report in only(Message, driver.reports()) if report.level == "warn"]
    assert warnings[0].startswith(
        "vLLM and the trainer compute different log-probabilities of the reference model: differences in 24 rows with "
    )
    assert warnings[1] == "The workers, and not vLLM, compute the reference model's scores."
    released = driver.reports().index(ReferenceReleased())
    assert "scoring" in {report.stage for report in only(Progress, driver.reports()[released:])}
    assert figures(driver.reports())[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_a_small_job_does_not_wait_for_an_engine(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any
) -> None:
    given = {"reference": "a-reference-that-never-comes", "reference_source": "auto", "events_url": control_plane.url}
    driver = start(make_spec(config=TrainConfig(batch_size=8, n_epochs=1), **given))
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    messages = [report.message for report in only(Message, driver.reports())]
    assert messages[2].startswith("The workers, and not vLLM, compute the reference model's scores: they need about ")
    assert "and loading vLLM pays only if they need more than 60 s" in messages[2]
    assert not only(ReferenceWanted, driver.reports())
    assert figures(driver.reports())[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_an_attempt_trains_a_mixture_whose_experts_are_balanced(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any, model_source: str, tmp_path: Path
) -> None:
    """The balance is much larger than the tolerance of the first loss, which must be ln 2."""
    mixture = shutil.copytree(model_source, tmp_path / "mixture")
    build_mixture(router_aux_loss_coef=1.0).save_pretrained(mixture)
    given = {"reference": "a-reference-that-never-comes", "reference_source": "auto", "events_url": control_plane.url}
    config = TrainConfig(batch_size=8, n_epochs=1, max_length=128)
    driver = start(make_spec(config=config, model_source=str(mixture), **given))
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    first = figures(driver.reports())[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["aux_loss"] > 1
    messages = [report.message for report in only(Message, driver.reports())]
    assert any(message.startswith("The first loss is 0.69314") for message in messages)
    assert isinstance(driver.reports()[-1], Succeeded)


def test_a_deployment_that_departs_fails_a_job_that_insists_on_it(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], other_model_source: str, control_plane: Any
) -> None:
    given = {"reference": "tiny", "reference_source": "serve", "events_url": control_plane.url}
    driver = start(make_spec(model_source=other_model_source, **given))
    assert driver.wait() == 1, driver.log.read_text()[-5000:]
    last = control_plane.reports()[-1]
    assert isinstance(last, Failed)
    assert last.code == "reference_mismatch"
    assert "per token mean" in last.message


@pytest.mark.parametrize("source", ["auto", "serve"])
def test_a_reference_that_cannot_be_attached_is_scored_by_the_trainer_unless_the_job_insists(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], model_source: str, control_plane: Any, source: str
) -> None:
    adapter = Adapter(id="ft:tiny:stacked", source="s3://bucket/stacked")
    given = {"reference": "tiny", "reference_adapter": adapter, "reference_source": source}
    spec = make_spec(config=TrainConfig(batch_size=8, n_epochs=1), events_url=control_plane.url, **given)
    weights = cache.model_digest(model_source, weights=True)
    rates.write(engine_rate_uri(spec.cache_uri, weights, "float32"), Rate(tokens_per_second=1e9))
    driver = start(spec)
    assert driver.wait() == (source == "serve"), driver.log.read_text()[-5000:]
    why = "The engine cannot attach the adapter 'ft:tiny:stacked'."
    if source == "serve":
        remedy = "Then submit the job again, or send x_raydpo.reference.source 'auto' or 'trainer'."
        assert driver.reports()[-1] == Failed(code="adapter_unusable", message=f"{why} {remedy}")
        return
    warnings = [report.message for report in only(Message, driver.reports()) if report.level == "warn"]
    assert warnings == [f"{why} The workers compute the reference model's scores instead."]
    assert figures(driver.reports())[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_an_attempt_trains_on_rows_from_the_web(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any, pairs: str
) -> None:
    with running_web() as web:
        web.files["/rows.jsonl.gz"] = gzip.compress(storage.read_bytes(pairs))
        web.cuts = [100]
        config = TrainConfig(objective=Orpo(), batch_size=8, n_epochs=1)
        uri, prefixes = f"{web.url}/rows.jsonl.gz", (f"{web.url}/",)
        spec = make_spec(config=config, training_uri=uri, dataset_uris=prefixes, events_url=control_plane.url)
        driver = start(spec)
        assert driver.wait() == 0, driver.log.read_text()[-5000:]
    reports = driver.reports()
    stages = list(dict.fromkeys(report.stage for report in only(Progress, reports)))
    assert stages == ["downloading", "encoding", *TO_TRAIN, "exporting"]
    messages = [report.message for report in only(Message, reports)]
    begun = messages.index("Training file: the rows are being read and checked.")
    assert begun < messages.index("Training file has 24 pairs (OpenAI preference format).")
    assert len(only(StepMetrics, reports)) == 3
    assert isinstance(reports[-1], Succeeded)


def test_a_uri_that_may_not_be_read_fails_the_job(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any
) -> None:
    spec = make_spec(training_uri="http://localhost:9/rows.jsonl", dataset_uris=("http://",))
    driver = start(spec.model_copy(update={"events_url": control_plane.url}))
    assert driver.wait() == 1, driver.log.read_text()[-5000:]
    last = control_plane.reports()[-1]
    assert (last.kind, last.code, last.param) == ("failed", "invalid_training_file", "x_raydpo.dataset")
    assert "not public" in last.message


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(Orpo(), id="found by the workers", marks=pytest.mark.long),
        pytest.param(Dpo(), id="found where it is scored"),
    ],
)
def test_a_model_that_cannot_be_trained_fails_the_job_and_is_not_tried_again(
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    model_source: str,
    tmp_path: Path,
    objective: Objective,
) -> None:
    model = shutil.copytree(model_source, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = TrainConfig(objective=objective, batch_size=8, n_epochs=1)
    driver = start(make_spec(config=config, model_source=str(model), events_url=control_plane.url))
    assert driver.wait() == 1, driver.log.read_text()[-5000:]
    last = driver.reports()[-1]
    assert (last.kind, last.code, last.param) == ("failed", "invalid_model", "model")
    said = r"The (model cannot be trained|reference model cannot be used): .* lacks 1 weights, such as model.norm"
    assert re.search(said, last.message)


def test_an_attempt_that_cannot_go_on_says_why(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any, tmp_path: Path
) -> None:
    config = TrainConfig(objective=Orpo(), batch_size=8, n_epochs=1)
    cache = tmp_path / "cache"
    cache.write_text("no folder")
    driver = start(make_spec(config=config, events_url=control_plane.url))
    assert driver.wait() == 1
    (died,) = only(Died, driver.reports())
    assert died.cause.startswith("NotADirectoryError: "), died
    assert driver.reports()[-1] == died


def test_a_fenced_attempt_stops(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any
) -> None:
    control_plane.default = 409
    driver = start(make_spec(config=CONFIG, reference="a-reference-that-never-comes", events_url=control_plane.url))
    assert driver.wait() == 3, driver.log.read_text()[-5000:]


def test_sigterm_ends_an_attempt_before_sigkill_would(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any
) -> None:
    driver = start(make_spec(config=CONFIG, reference="a-reference-that-never-comes", events_url=control_plane.url))
    driver.reported(Progress)
    started = time.monotonic()
    driver.process.terminate()
    assert driver.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - started < 10  # two seconds where nothing else runs
    assert not only(Failed, driver.reports())


def resumed(first: Driver, start: Callable[[AttemptSpec], Driver], uninterrupted: Driver) -> None:
    """Runs the attempt after the paused attempt `first`, and asserts that both together equal the uninterrupted one."""
    before = first.reports()
    step = before[-1].step
    assert before[-1] == Paused(step=step)
    assert 0 < step < NUM_STEPS
    assert only(CheckpointSaved, before)[-1].step == step
    second = start(first.spec.model_copy(update={"attempt": 2}))
    assert second.wait() == 0, second.log.read_text()[-5000:]
    after = second.reports()
    assert only(Started, after)[0].resumed_from == step
    assert figures(before) | figures(after) == figures(uninterrupted.reports())
    assert not figures(before).keys() & figures(after).keys()


def test_a_paused_attempt_leaves_a_checkpoint_and_is_continued_bit_for_bit(
    uninterrupted: Driver, make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any
) -> None:
    first = start(make_spec(config=CONFIG, reference="tiny", events_url=control_plane.url))
    first.reported(StepMetrics)
    control_plane.desired = "pause"
    assert first.wait(300) == 4, first.log.read_text()[-5000:]
    assert control_plane.reports()[-1] == first.reports()[-1]
    control_plane.desired = "run"
    resumed(first, start, uninterrupted)


def test_sigterm_with_grace_leaves_a_checkpoint(
    uninterrupted: Driver,
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    control_plane: Any,
    ray_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ray_environment, "RAY_JOB_STOP_WAIT_TIME_S", "30")
    first = start(make_spec(config=CONFIG, num_workers=1, reference="tiny", events_url=control_plane.url))
    first.reported(StepMetrics)
    first.process.terminate()
    assert first.wait(300) == 4, first.log.read_text()[-5000:]
    resumed(first, start, uninterrupted)


def test_a_pause_while_data_is_prepared_stops_at_once_and_a_cancelled_attempt_as_well(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], control_plane: Any
) -> None:
    spec = make_spec(config=CONFIG, reference="a-reference-that-never-comes", events_url=control_plane.url)
    first = start(spec)
    first.reported(Progress)
    control_plane.desired = "pause"
    assert first.wait(300) == 4, first.log.read_text()[-5000:]
    assert first.reports()[-1] == control_plane.reports()[-1] == Paused(step=0)
    control_plane.desired = "cancel"
    assert start(spec.model_copy(update={"attempt": 2})).wait(300) == 5
