"""Tests which checkpoints of a job stay listed. The database and the storage are real, and there is no cluster."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from services import storage
from services.contract import CheckpointSaved, JobEvent
from services.control_plane.attempts import attempts
from services.control_plane.core.errors import NotFound
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Job, Model
from services.control_plane.models import models
from services.control_plane.models.deployments import deployments
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs
from tests.services.control_plane.test_cleanup import sweep

LEASED = """
    INSERT INTO leases (name, holder, expires_at) VALUES (%s, 'a test', now() + interval '1 hour')
"""  # so that no control plane works on it
OPTIMIZER = "optimizer-00001-of-00001.safetensors"
Act = Callable[[Callable[[AsyncSession], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def act(settings: Settings) -> Act:
    """Returns a function that runs its argument in a transaction of the service."""

    def act(work: Callable[[AsyncSession], Coroutine[Any, Any, Any]]) -> Any:
        async def run() -> Any:
            store = Store(settings.database_url)
            try:
                async with store.begin() as session:
                    return await work(session)
            finally:
                await store.close()

        return asyncio.run(run())

    return act


class Run:
    """A job whose only attempt reports checkpoints."""

    def __init__(self, client: openai.OpenAI, settings: Settings, act: Act, file_id: str, **extension: Any) -> None:
        self.client, self.settings, self.act, self.seq = client, settings, act, 0
        validates = extension.pop("validates", True)
        extension |= {"validation_share": 0.25} if validates else {}
        self.id = client.fine_tuning.jobs.create(
            model="tiny", training_file=file_id, method={"type": "dpo"}, extra_body={"x_raydpo": extension}
        ).id

        async def begin(session: AsyncSession) -> None:
            (await session.get_one(Job, self.id)).observed = "running"
            await attempts.begin(session, self.id, 1, None, num_accelerators=0)

        act(begin)

    def uri(self, step: int) -> str:
        return storage.join(self.settings.storage_url, "runs", self.id, "checkpoints", f"step-{step:06d}")

    def name(self, step: int) -> str:
        return f"ft:tiny:raydpo::{self.id.removeprefix('ftjob-')}:ckpt-step-{step}"

    def save(self, step: int, loss: float | None = None) -> None:
        for name in ("manifest.json", OPTIMIZER, "model/model.safetensors"):
            storage.write_bytes(storage.join(self.uri(step), *name.split("/")), b"{}")
        metrics = {"loss": 0.1} | ({} if loss is None else {"eval/loss": loss})
        report = CheckpointSaved(step=step, uri=self.uri(step), metrics=metrics)
        event = JobEvent(seq=self.seq, created_at=time.time(), report=report)
        self.seq += 1
        self.act(lambda session: attempts.record(session, self.id, 1, [event], self.settings, posted=True))

    def steps(self) -> list[int]:
        """Returns the steps of the listed checkpoints, and asserts that exactly their models are listed as well."""
        listed = list(self.client.fine_tuning.jobs.checkpoints.list(self.id))
        named = {each.fine_tuned_model_checkpoint for each in listed}
        prefix = self.name(0).removesuffix("0")
        assert named == {model.id for model in self.client.models.list() if model.id.startswith(prefix)}
        return sorted(each.step_number for each in listed)

    def told(self) -> list[str]:
        events = self.client.fine_tuning.jobs.list_events(self.id, limit=100)
        return [event.message for event in events if "removed, because" in event.message][::-1]


@pytest.fixture
def start(client: openai.OpenAI, settings: Settings, act: Act) -> Iterator[Callable[..., Run]]:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    runs: list[Run] = []

    def start(**extension: Any) -> Run:
        runs.append(Run(client, settings, act, file.id, **extension))
        return runs[-1]

    yield start

    async def end(session: AsyncSession) -> None:
        for run in runs:
            (await session.get_one(Job, run.id)).observed = "paused"

    act(end)
    for run in runs:
        client.fine_tuning.jobs.cancel(run.id)


def test_the_last_two_and_the_best_stay_and_the_others_go_with_all_that_they_hold(
    start: Callable[..., Run], client: openai.OpenAI, settings: Settings
) -> None:
    run = start()
    for step, loss in ((10, 0.5), (20, 0.3), (30, 0.4)):
        run.save(step, loss)
    assert (run.steps(), len(run.told())) == ([20, 30], 1)
    for step, loss in ((40, 0.6), (50, 0.7)):
        run.save(step, loss)
    assert run.steps() == [20, 40, 50]
    assert run.told() == [
        f"Checkpoint of step {step} removed, because keep_checkpoints is 2: {run.name(step)}" for step in (10, 30)
    ]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(run.name(10))
    sweep(settings)
    assert [storage.exists(run.uri(step)) for step in (10, 20, 30, 40, 50)] == [False, True, False, True, True]
    run.save(60, 0.2)
    assert run.steps() == [50, 60]


@pytest.mark.parametrize(
    ("extension", "steps"),
    [
        ({}, [30, 40]),
        ({"keep_checkpoints": 1}, [40]),
        ({"keep_checkpoints": 3}, [20, 30, 40]),
        ({"keep_checkpoints": "all"}, [10, 20, 30, 40]),
    ],
)
def test_without_evaluations_the_last_ones_stay(
    start: Callable[..., Run], extension: dict[str, Any], steps: list[int]
) -> None:
    run = start(validates=False, **extension)
    for step in (10, 20, 30, 40):
        run.save(step)
    assert run.steps() == steps


def test_a_job_of_an_earlier_release_keeps_all(start: Callable[..., Run], settings: Settings) -> None:
    run = start()
    with psycopg.connect(settings.database_url) as connection:
        without = "spec #- '{keep_checkpoints}' #- '{policy}' #- '{config,best_metric}' #- '{config,early_stop}'"
        connection.execute(f"UPDATE jobs SET spec = {without} WHERE id = %s", [run.id])
    for step in (10, 20, 30, 40):
        run.save(step, 0.5)
    assert run.steps() == [10, 20, 30, 40]
    shown = run.client.fine_tuning.jobs.retrieve(run.id).to_dict()["x_raydpo"]
    expected = {"keep_checkpoints": "all", "best_metric": "eval/loss", "early_stop": None, "policy": "last"}
    assert {name: shown[name] for name in expected} == expected


def test_what_is_shared_or_loaded_or_named_by_a_job_stays_as_long_as_it_is(
    start: Callable[..., Run], client: openai.OpenAI, settings: Settings, act: Act
) -> None:
    run = start(keep_checkpoints=1, validates=False)
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("INSERT INTO projects (id, name) VALUES ('proj_b', 'b') ON CONFLICT DO NOTHING")
    run.save(10)
    (permission,) = client.fine_tuning.checkpoints.permissions.create(run.name(10), project_ids=["proj_b"])
    run.save(20)

    async def load(session: AsyncSession) -> str:
        model = await models.find(session, settings, run.name(20))
        await deployments.use(session, model)
        return model.app_name

    app_name = act(load)
    run.save(30)
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    body: Any = {"model": run.name(30), "training_file": file.id, "method": {"type": "dpo"}}
    client.fine_tuning.jobs.cancel(client.fine_tuning.jobs.create(**body).id)
    run.save(40)
    reference: Any = {"x_raydpo": {"reference": {"model": run.name(40)}}}
    client.fine_tuning.jobs.cancel(client.fine_tuning.jobs.create(**body | {"model": "tiny"}, extra_body=reference).id)
    run.save(50)
    assert (run.steps(), run.told()) == ([10, 20, 30, 40, 50], [])

    client.fine_tuning.checkpoints.permissions.delete(permission.id, fine_tuned_model_checkpoint=run.name(10))
    run.save(60)
    assert run.steps() == [20, 30, 40, 60]
    act(lambda session: deployments.forget(session, app_name))
    run.save(70)
    assert run.steps() == [30, 40, 70]


def test_what_a_job_names_in_its_evaluations_stays_until_they_are_created(
    start: Callable[..., Run], client: openai.OpenAI, settings: Settings
) -> None:
    run = start(keep_checkpoints=1, validates=False)
    run.save(10)
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    compare = {"kind": "compare", "file": file.id, "baseline": run.name(10), "judge": {"type": "length"}}
    named: Any = {"x_raydpo": {"evaluations": {"better": compare}}}
    body: Any = {"model": "tiny", "training_file": file.id, "method": {"type": "dpo"}}
    job = client.fine_tuning.jobs.create(**body, extra_body=named)
    run.save(20)
    assert run.steps() == [10, 20]
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute(LEASED, ["job evaluation m better"])
        rows.execute(
            "INSERT INTO job_evaluations (id, project_id, job_id, name, model_id)"
            " VALUES ('m better', 'proj_default', %s, 'better', 'm')",
            [job.id],
        )
        client.fine_tuning.jobs.cancel(job.id)
        run.save(30)
        assert run.steps() == [10, 30]
        with pytest.raises(openai.BadRequestError, match=f"waiting evaluation of the job {job.id}"):
            client.models.delete(run.name(10))
        rows.execute("DELETE FROM job_evaluations")
    run.save(40)
    assert run.steps() == [40]


def test_a_sweep_keeps_the_models_of_its_evaluations_and_no_others(
    start: Callable[..., Run], settings: Settings
) -> None:
    run = start(keep_checkpoints=1, validates=False)
    for step in (10, 20):
        run.save(step)
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute(LEASED, ["sweep s"])
        rows.execute(
            "INSERT INTO sweeps (id, project_id, key_id, spec, state, num_trials)"
            " VALUES ('s', 'proj_default', 'key', '{}', 'running', 1)"
        )
        rows.execute(
            "INSERT INTO sweep_evaluations (sweep_id, number, name, spec, rows)"
            " VALUES ('s', 0, 'better', jsonb_build_object('baseline', %s::text), '{}')",
            [run.name(20)],
        )
        run.save(30)
        run.save(40)
        assert run.steps() == [20, 40]
        rows.execute("DELETE FROM sweep_evaluations")
        rows.execute("DELETE FROM sweeps")


def test_what_is_attached_to_its_base_stays_for_an_hour_after_its_last_use(
    start: Callable[..., Run], settings: Settings, act: Act
) -> None:
    run = start(keep_checkpoints=1, validates=False)

    async def use(session: AsyncSession) -> None:
        await models.note_use(session, await models.find(session, settings, run.name(10)))

    async def used_earlier(session: AsyncSession) -> None:
        (await session.get_one(Model, run.name(10))).attached_at = datetime.now(UTC) - timedelta(hours=1, minutes=1)

    run.save(10)
    act(use)
    run.save(20)
    assert run.steps() == [10, 20]
    act(used_earlier)
    run.save(30)
    assert run.steps() == [30]


def test_an_adapter_that_was_dropped_on_the_way_is_not_used(
    start: Callable[..., Run], settings: Settings, act: Act
) -> None:
    run = start(keep_checkpoints=1, validates=False)
    run.save(10)
    found = act(lambda session: models.find(session, settings, run.name(10)))
    run.save(20)
    with pytest.raises(NotFound, match="was deleted"):
        act(lambda session: models.note_use(session, found))


def test_what_becomes_the_policy_is_not_deleted_before_it_is(start: Callable[..., Run], client: openai.OpenAI) -> None:
    run, other = start(policy="best"), start()
    for each in (run, other):
        for step, loss in ((10, 0.3), (20, 0.5), (30, 0.6)):
            each.save(step, loss)
    with pytest.raises(openai.BadRequestError, match="its best checkpoint so far, as its policy"):
        client.models.delete(run.name(10))
    assert client.models.delete(run.name(20)).deleted
    assert client.models.delete(other.name(10)).deleted
    assert (run.steps(), other.steps()) == ([10, 30], [20, 30])
    run.save(40, 0.2)
    assert run.steps() == [30, 40]


def test_a_checkpoint_that_a_user_deletes_leaves_the_list_and_goes_with_its_optimizers_state(
    start: Callable[..., Run], client: openai.OpenAI, settings: Settings
) -> None:
    run = start(keep_checkpoints="all")
    for step in (10, 20):
        run.save(step, 0.5)
    assert client.models.delete(run.name(10)).deleted
    sweep(settings)
    assert (run.steps(), storage.exists(run.uri(10)), storage.exists(run.uri(20))) == ([20], False, True)


def test_a_checkpoint_that_is_reported_again_is_offered_once_and_a_dropped_one_not_again(
    start: Callable[..., Run], client: openai.OpenAI
) -> None:
    run = start(keep_checkpoints=1)
    for step, loss in ((10, 0.5), (20, 0.4), (20, 0.375), (10, 0.5)):
        run.save(step, loss)
    assert (run.steps(), len(run.told())) == ([20], 1)
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(run.id)
    assert checkpoint.metrics.to_dict()["full_valid_loss"] == 0.375


def test_the_list_goes_on_after_a_checkpoint_that_is_there(start: Callable[..., Run], api: httpx.Client) -> None:
    run = start(keep_checkpoints=3, validates=False)
    for step in (10, 20, 30, 40):
        run.save(step)
    path = f"/fine_tuning/jobs/{run.id}/checkpoints"
    first = api.get(path, params={"limit": 2}).json()
    rest = api.get(path, params={"after": first["last_id"]}).json()
    assert [each["step_number"] for page in (first, rest) for each in page["data"]] == [40, 30, 20]
    assert (first["has_more"], rest["has_more"]) == (True, False)


def test_a_job_that_starts_from_a_checkpoint_as_it_would_be_dropped_keeps_it(
    start: Callable[..., Run], settings: Settings
) -> None:
    """The new job holds the model's row. Dropping waits for the row, looks again, and finds that the model is
    needed."""
    run = start()
    run.save(10)

    async def meet() -> set[str]:
        store = Store(settings.database_url)
        async with store.begin() as session:
            await models.find(session, settings, run.name(10), hold=True)
            dropping = asyncio.create_task(drop(store))
            for _ in range(1000):
                if await session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
                    break
                await asyncio.sleep(0.01)
            assert not dropping.done()
            job = await session.get_one(Job, run.id)
            fields = {"model_source": "/m", "model_root": "tiny", "project_id": job.project_id, "desired": "cancel"}
            fields |= {"observed": "cancelled", "finished_at": job.created_at}
            session.add(Job(id=f"ftjob-{'0' * 24}", spec={"model": run.name(10)}, **fields))
        dropped = await dropping
        await store.close()
        return dropped

    async def drop(store: Store) -> set[str]:
        async with store.begin() as session:
            return await models.withdraw_unused(session, [run.name(10)])

    assert asyncio.run(meet()) == set()
    assert run.steps() == [10]


def test_a_checkpoint_on_which_the_adapter_of_a_deleted_job_stands_is_not_dropped(
    start: Callable[..., Run], client: openai.OpenAI, api: httpx.Client, settings: Settings
) -> None:
    run = start(keep_checkpoints=1, validates=False)
    run.save(10)
    file_id = client.fine_tuning.jobs.retrieve(run.id).training_file
    job = client.fine_tuning.jobs.create(model=run.name(10), training_file=file_id, method={"type": "dpo"})
    client.fine_tuning.jobs.cancel(job.id)
    with psycopg.connect(settings.database_url) as rows:
        rows.execute(
            "INSERT INTO models (id, project_id, source, root, base_source, adapter, job_id)"
            " VALUES (%s, 'proj_default', '/adapter', 'tiny', %s, '{\"r\": 8}', %s)",
            [f"ft:of:{job.id}", storage.join(run.uri(10), "model"), job.id],
        )
    assert api.delete(f"/x/jobs/{job.id}").status_code == 200
    for step in (20, 30):
        run.save(step)
    assert run.steps() == [10, 30]


def test_a_job_does_not_start_from_a_checkpoint_that_was_just_dropped(
    start: Callable[..., Run], client: openai.OpenAI, act: Act
) -> None:
    run = start(keep_checkpoints=1, validates=False)
    run.save(10)
    run.save(20)

    async def look(session: AsyncSession) -> bool:
        return (await session.get_one(Model, run.name(10))).deleted_at is not None

    assert act(look)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.fine_tuning.jobs.create(model=run.name(10), training_file="file-none")
