"""Runs the whole service on several machines: a Ray cluster of a head and workers, the control plane, an object store
and a database, each of which can be killed or cut off."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from services import storage
from services.local.ray_head import NOTICE_CUTS
from tests.cluster.machines import VOLUME, Machine, Network
from tests.services.proxy import Proxy
from tests.services.s3 import S3

KEY = "rd-a-key-of-the-cluster"
# As the kubelet does: what ends is started again.
RESTARTS = 'while true; do "$@"; echo "ended with $?"; sleep 1; done'


class Service:
    """The service on a network of machines. Storage is a bucket on `s3`; the database is behind the proxy
    `database`.

    `nodes` has the machines that run Ray, by name: the head, and the workers that were added.
    """

    def __init__(self, network: Network, s3: S3, database_url: str, folder: Path) -> None:
        self._network, self.s3, self._folder = network, s3, folder
        address, _, socket = database_url.partition("?host=")
        name = address.rpartition("/")[2]
        self.database = Proxy(f"{socket}/.s.PGSQL.5432", host=network.host)
        self.storage_url = s3.new_folder()
        self._token = secrets.token_hex()
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "RAY_USAGE_STATS_ENABLED": "0"}
        self.ray_environment = own | NOTICE_CUTS | s3.environment  # of Ray's nodes, and of who connects to them
        self._database_url = f"postgresql://postgres:@{network.host}:{self.database.port}/{name}"
        self.nodes: dict[str, Machine] = {}
        (folder / "gcs").mkdir()
        self.head = self.nodes["head"] = network.add("head", volume=folder / "gcs")
        self.control_plane = network.add("control")
        self.url = f"http://{self.control_plane.address}:8000"

    # --- Ray -----------------------------------------------------------------------------------------------

    def start_head(self) -> None:
        options = ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0"]
        self._start_ray(self.head, options)

    def add_node(self, name: str, num_cpus: int) -> Machine:
        """Adds a machine with a Ray node that lends Ray `num_cpus` CPUs, and returns the machine."""
        machine = self.nodes[name] = self._network.add(name)
        self.start_node(name, num_cpus)
        return machine

    def start_node(self, name: str, num_cpus: int) -> None:
        self._start_ray(self.nodes[name], [f"--address={self.head.address}:6379", f"--num-cpus={num_cpus}"])

    def _start_ray(self, machine: Machine, options: list[str]) -> None:
        shared = [f"--node-ip-address={machine.address}", "--object-store-memory=100000000", "--block"]
        settings = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": VOLUME} if machine is self.head else {}
        machine.spawn(
            *("sh", "-c", RESTARTS, "sh", "ray", "start", *shared, *options),
            log=self._folder / f"{machine.name}.log",
            environment=self.ray_environment | settings,
        )

    def processes(self, word: str) -> list[psutil.Process]:
        """Returns the processes of all Ray nodes whose command line contains `word`."""
        return [process for node in self.nodes.values() for process in node.processes(word)]

    # --- the control plane ---------------------------------------------------------------------------------

    def start_control_plane(self, models: dict[str, Path]) -> None:
        """Starts the control plane with base models, whose folders are copied to the storage first."""
        for name, folder in models.items():
            storage.publish(folder, storage.join(self.storage_url, "base", name))
        self._models = {name: storage.join(self.storage_url, "base", name) for name in models}
        self.restart_control_plane()

    def restart_control_plane(self) -> None:
        environment = {
            "DATABASE_URL": self._database_url,
            "RAYDPO_STORAGE_URL": self.storage_url,
            "RAYDPO_API_KEY": KEY,
            "RAYDPO_RAY_TOKEN": self._token,
            "RAYDPO_ADVERTISED_URL": self.url,
            "RAYDPO_HOME": "/tmp/raydpo",
            "RAYDPO_LOG_FORMAT": "json",
        }
        models = [f"--model={name}={source}" for name, source in self._models.items()]
        ray = f"--ray-address=http://{self.head.address}:8265"
        self.control_plane.spawn(
            *("sh", "-c", RESTARTS, "sh", "raydpo", "up", "--host=0.0.0.0", "--port=8000", ray, *models),
            log=self._folder / "control.log",
            environment=environment | self.s3.environment,
        )
        wait_for(self._is_ready, "the control plane is ready")

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def client(self) -> openai.OpenAI:
        http = httpx.Client(trust_env=False, timeout=60)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=20, http_client=http)

    def close(self) -> None:
        self.control_plane.kill()
        for machine in self.nodes.values():
            machine.kill()
        self.database.close()

    def logs(self) -> str:
        return "\n".join(f"{log}: {log.read_text(errors='replace')[-3000:]}" for log in self._folder.glob("*.log"))


@contextmanager
def running_service(network: Network, s3: S3, database_url: str, folder: Path) -> Iterator[Service]:
    service = Service(network, s3, database_url, folder)
    try:
        yield service
    finally:
        service.close()


def wait_for(condition: Callable[[], Any], what: str, *, seconds: float = 900.0) -> Any:
    """Calls `condition` until it returns something true, and returns this value. Fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")
