"""Tests that a job outlives a neighbour that takes the node's memory again and again."""

import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.conftest import Service, running_service, tiny_model, wait_for
from tests.e2e.test_service import finished, messages, shop_pairs, steps, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(3600)]

GROUPS = Path("/sys/fs/cgroup/memory")  # version 1 of the kernel's groups of processes
LIMIT = 6 * 2**30  # bytes of memory for the service, its Ray and the neighbour together
THRESHOLD = 0.7  # the share of LIMIT from which on Ray kills processes; the neighbour takes a bit more

# Becomes one of the group and sees it in the place of all groups, as the processes of a container do.
JOIN = 'echo $$ > "$0/cgroup.procs" && mount --bind "$0" /sys/fs/cgroup/memory && exec "$@"'

NEIGHBOUR = """
import sys, threading, time
from pathlib import Path
group, most, held = Path(sys.argv[1]), int(sys.argv[2]), []
(group / "cgroup.procs").write_text("0")  # this process
def used():
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    files = int(stat["total_inactive_file"]) + int(stat["total_active_file"])
    return int((group / "memory.usage_in_bytes").read_text()) - files
waiter = threading.Thread(target=sys.stdin.read)
waiter.start()
while waiter.is_alive():
    if used() < most:
        held.append(bytearray(b"1") * 2**26)
    else:
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def group() -> Iterator[Path]:
    """Returns the folder of a new group of processes, which have LIMIT bytes of memory together."""
    if psutil.virtual_memory().available < LIMIT + 2**30:
        pytest.skip(f"less than {LIMIT / 2**30 + 1:.0f} GiB of memory are free")
    folder = GROUPS / f"raydpo-test-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"no groups of processes can be made here, which takes root and cgroups of version 1: {error}")
    yield folder
    wait_for(lambda: not (folder / "cgroup.procs").read_text(), "the group is empty")
    folder.rmdir()


@pytest.fixture(scope="module")
def service(group: Path) -> Iterator[Service]:
    runner = ["unshare", "--mount", "sh", "-c", JOIN, str(group)]
    with running_service(make_models, runner=runner, RAY_memory_usage_threshold=str(THRESHOLD)) as service:
        yield service


def make_models(folder: Path) -> dict[str, Path]:
    return {"tiny": tiny_model(folder / "tiny", hidden_size=256, num_layers=4)}


@contextmanager
def neighbour(group: Path) -> Iterator[None]:
    """Runs a process of the group that takes memory until Ray kills others for it, and again what these leave."""
    command = [sys.executable, "-c", NEIGHBOUR, str(group), str(int((THRESHOLD + 0.1) * LIMIT))]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        yield
        process.communicate(timeout=60)


def submit(client: openai.OpenAI) -> str:
    file = client.files.create(file=("pairs.jsonl", shop_pairs(80)), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 50, "batch_size": 8, "learning_rate": 1e-4}
    return client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        extra_body={"x_raydpo": {"checkpoint_steps": 10, "reference": {"source": "trainer"}}},
    ).id


def events(client: openai.OpenAI, job_id: str) -> list[tuple[str, int]]:
    """Returns the messages and times of the job's events, the oldest first."""
    return [(event.message, event.created_at) for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def deaths(client: openai.OpenAI, job_id: str) -> list[tuple[int, int, int]]:
    """Returns for each death of an attempt that its event blames on the memory, with Ray's figures: the number of the
    attempt, the seconds that the next one waits, and the time."""
    told = (
        r"Attempt (\d+) of the job ended: memory ran out on the node \S+: "
        rf"[\d.]+ GB of {LIMIT / 2**30:.2f} GB were in use.*; the next attempt begins (\d+) s later"
    )
    found = ((re.fullmatch(told, message), time) for message, time in events(client, job_id))
    return [(int(match[1]), int(match[2]), time) for match, time in found if match]


def wait_for_deaths(client: openai.OpenAI, job_id: str, count: int) -> None:
    def died() -> bool:
        assert client.fine_tuning.jobs.retrieve(job_id).status == "running", messages(client, job_id)
        return len(deaths(client, job_id)) >= count

    wait_for(died, f"{count} deaths")


def test_a_job_whose_memory_a_neighbour_takes_three_times_ends_well(
    service: Service, client: openai.OpenAI, group: Path
) -> None:
    """The neighbour stays for two attempts, of which the second one gets no further, and comes back during the third.
    Each time Ray kills what runs for the job."""
    job_id = submit(client)
    wait_for_step(client, job_id, 30)
    with neighbour(group):
        wait_for_deaths(client, job_id, 2)
    wait_for_step(client, job_id, steps(client, job_id)[-1] + 30)  # past another checkpoint
    with neighbour(group):
        wait_for_deaths(client, job_id, 3)
    assert finished(client, job_id).status == "succeeded", messages(client, job_id)
    found = deaths(client, job_id)
    assert [(attempt, seconds) for attempt, seconds, _ in found] == [(1, 5), (2, 25), (3, 5)]
    starts = [time for message, time in events(client, job_id) if message.startswith("Fine-tuning job started")]
    for _, seconds, died in found:
        assert min(start for start in starts if start >= died) - died >= seconds - 1  # times are whole seconds
    assert steps(client, job_id) == list(range(1, 501))
