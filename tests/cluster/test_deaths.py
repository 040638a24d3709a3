"""Tests that a job on several machines ends with the same figures, whatever dies while it runs.

Four workers train on two machines, and the engine that scores the reference is on a third. Files are shared only
through the object store. Each death happens once in each part of a job's life.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import psutil
import pytest

from services import storage
from tests.cluster.machines import Network
from tests.cluster.service import Service, running_service, wait_for
from tests.e2e.conftest import tiny_model
from tests.e2e.test_service import shop_pairs
from tests.services.s3 import running_s3

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(3600)]

ENDED = ("succeeded", "failed", "cancelled")
NUM_PAIRS, NUM_STEPS = 200, 50
AWAY_SECONDS = 20.0  # how long what is cut off stays away
CLOCK = ("tokens_per_second", "hfu")  # figures that depend on the clock
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own processes, with which a node ends
Curve = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def service(network: Network, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("cluster")
    with running_s3(network.host) as s3, running_service(network, s3, database_url, folder) as service:
        service.start_head()
        service.add_node("engine", 1)
        service.start_control_plane({"tiny": tiny_model(folder / "tiny")})
        with service.client() as client:
            wait_for(lambda: answers(client, "tiny"), "the engine answers")
        # They come now, so that the engine is not on one of them.
        service.add_node("left", 2)
        service.add_node("right", 2)
        yield service


def answers(client: openai.OpenAI, model: str) -> bool:
    try:
        return bool(client.completions.create(model=model, prompt="a", max_tokens=2).choices)
    except (openai.APIStatusError, openai.APIConnectionError):
        return False


class Run:
    """A job with four workers on the same rows, which prepares its data itself."""

    def __init__(self, service: Service, client: openai.OpenAI) -> None:
        self.service, self._client = service, client
        storage.delete(storage.join(service.storage_url, "prepared"))
        file = client.files.create(file=("pairs.jsonl", shop_pairs(NUM_PAIRS)), purpose="fine-tune")
        hyperparameters: Any = {"n_epochs": 2, "batch_size": 8, "learning_rate": 1e-4}
        job = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file.id,
            method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
            seed=1,
            extra_body={"x_raydpo": {"num_workers": 4, "checkpoint_steps": 5, "reference": {"source": "serve"}}},
        )
        self.id = job.id

    def job(self) -> Any:
        return self._client.fine_tuning.jobs.retrieve(self.id)

    def events(self) -> list[Any]:
        return list(self._client.fine_tuning.jobs.list_events(self.id, limit=100))[::-1]

    def messages(self) -> str:
        return "\n".join(f"{event.created_at} {event.message}" for event in self.events() if event.type == "message")

    def reach(self, part: str) -> None:
        """Waits until the job is in this part of its life, one of PARTS, or in a later part. The job must not have
        ended."""

        def reached() -> bool:
            job = self.job()
            progress = job.x_raydpo["progress"] or {"stage": None, "done": 0}
            at = PARTS.index(part)
            trains = [progress["stage"] == "training", progress["stage"] == "training" and progress["done"] > 40]
            scores = [job.status == "running", progress["stage"] in ("loading reference", "scoring"), *trains]
            return job.status in ENDED or any(scores[at:])

        wait_for(reached, f"the job is {part}")
        assert self.job().status not in ENDED, f"the job ended before it was seen {part}"

    def finish(self) -> Any:
        job = wait_for(lambda: (found := self.job()).status in ENDED and found, "the job ends", seconds=1500)
        assert job.status == "succeeded", self.messages() + self.service.logs()
        return job

    def curve(self) -> Curve:
        """Returns the figures of each step, without those of the clock. Each step must have been told once."""
        told = [event.data for event in self.events() if event.type == "metrics"]
        assert [int(data["step"]) for data in told] == list(range(1, NUM_STEPS + 1))
        return {data["step"]: {name: data[name] for name in data if name not in CLOCK} for data in told}


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> Curve:
    with service.client() as client:
        run = Run(service, client)
        run.reach("training")
        places = [name for name in ("left", "right") for _ in service.nodes[name].processes("RayTrainWorker")]
        assert sorted(places) == ["left"] * 2 + ["right"] * 2
        assert service.nodes["engine"].processes("ServeReplica")
        job = run.finish()
        wait_for(lambda: answers(client, job.fine_tuned_model), "the policy answers")
        return run.curve()


def kill_worker(service: Service) -> None:
    """Kills a training worker, or if there is none, all processes that work for the job on a machine."""
    machine = service.nodes["left"]

    def workers() -> list[psutil.Process]:
        agents = {process.pid for agent in AGENTS for process in machine.processes(agent)}
        found = [process for process in machine.processes("ray::") if process.pid not in agents]
        return machine.processes("RayTrainWorker")[:1] or found

    for process in wait_for(workers, "a process works on the machine"):
        process.kill()


def kill_replicas(service: Service) -> None:
    """Kills the processes of all engines."""
    for process in wait_for(lambda: service.processes("ServeReplica"), "an engine runs"):
        process.kill()


def kill_node(service: Service) -> None:
    service.nodes["left"].kill()
    time.sleep(AWAY_SECONDS)
    service.nodes["left"].start()
    service.start_node("left", 2)


def cut_node(service: Service) -> None:
    service.nodes["left"].cut()
    time.sleep(AWAY_SECONDS)
    service.nodes["left"].heal()


def kill_engine(service: Service) -> None:
    service.nodes["engine"].kill()
    service.nodes["engine"].start()
    service.start_node("engine", 1)


def kill_head(service: Service) -> None:
    service.head.kill()
    service.head.start()
    service.start_head()


def kill_control_plane(service: Service) -> None:
    service.control_plane.kill()
    service.control_plane.start()
    service.restart_control_plane()


def take_database(service: Service) -> None:
    service.database.refusing = True
    service.database.cut()
    time.sleep(AWAY_SECONDS)
    service.database.pass_on()


def take_storage(service: Service) -> None:
    service.s3.proxy.refusing = True
    service.s3.proxy.cut()
    time.sleep(AWAY_SECONDS)
    service.s3.proxy.pass_on()


DEATHS: dict[str, Callable[[Service], None]] = {
    "worker": kill_worker,
    "node": kill_node,
    "cut node": cut_node,
    "engine": kill_engine,
    "head": kill_head,
    "control plane": kill_control_plane,
    "database": take_database,
    "storage": take_storage,
}
DEATHS_OF_ENGINES = DEATHS | {"worker": kill_replicas}
PARTS = ("preparing", "scoring", "training", "publishing")


def test_a_job_trains_on_two_machines_with_its_reference_on_a_third(undisturbed: Curve) -> None:
    assert undisturbed[1]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("death", DEATHS)
def test_a_job_ends_with_the_same_figures(service: Service, undisturbed: Curve, death: str, part: str) -> None:
    with service.client() as client:
        run = Run(service, client)
        run.reach(part)
        DEATHS[death](service)
        job = run.finish()
        assert run.curve() == undisturbed
        wait_for(lambda: answers(client, job.fine_tuned_model), "the policy answers")


@pytest.mark.parametrize("death", DEATHS_OF_ENGINES)
def test_a_policy_answers_again(service: Service, undisturbed: Curve, death: str) -> None:
    with service.client() as client:
        policy = next(model.id for model in client.models.list() if model.id.startswith("ft:"))
        wait_for(lambda: answers(client, policy), "the policy answers")
        DEATHS_OF_ENGINES[death](service)
        wait_for(lambda: answers(client, policy), f"the policy answers again after the death of the {death}")
