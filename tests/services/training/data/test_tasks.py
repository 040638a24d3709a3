import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.training.data.tasks import MOST_BESIDE, num_processes

PROGRAM = """
import json, os, sys, time
from pathlib import Path
import ray
from services.training.data import tasks
from services.training.data.encoding import Encoded, Piece
from services.training.data.file_report import EncodingReport

SIZE, RECEIVED = 3, Path(sys.argv[1])

def work(piece):
    before = RECEIVED / str(piece.number - 1)
    deadline = time.monotonic() + 60
    while piece.number % SIZE and not before.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    in_time = time.monotonic() < deadline
    return Encoded(piece=piece.number, report=EncodingReport(), limit=int(in_time))

ray.init(address="auto", logging_level="ERROR")
tasks.TASKS_PER_PROCESS = 1
pieces = [Piece(number=number, first_line=1, num_rows=1, start=0, size=1) for number in range(SIZE * os.cpu_count())]
came = []
for result in tasks.in_tasks(work, pieces, Encoded):
    (RECEIVED / str(result.piece)).touch()
    came.append((result.piece, bool(result.limit)))
print(json.dumps(came))
"""


@pytest.mark.ray
def test_each_item_is_worked_on_once_and_its_result_awaits_no_other_of_its_task(
    ray_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    run = subprocess.run(command, env=ray_environment, check=True, timeout=300, stdout=subprocess.PIPE)
    came = json.loads(run.stdout.splitlines()[-1])
    assert sorted(number for number, _ in came) == list(range(3 * (os.cpu_count() or 1)))
    assert all(in_time for _, in_time in came), (
        f"an item was begun when the one before it in its task had been received: {came}"
    )


FAILING = """
import errno, json, sys
from pathlib import Path
import ray
from services.training.data import tasks
from services.training.data.encoding import Encoded, Piece
from services.training.data.file_report import EncodingReport
from services.training.run import unavailable_storage

FOLDER = Path(sys.argv[1])

def work(piece):
    full, away = FOLDER / f"full {piece.number}", FOLDER / f"away {piece.number}"
    if not full.exists():
        full.touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    if not away.exists():
        away.touch()
        raise OSError("When reading key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION during GetObject: curlCode: 7")
    return Encoded(piece=piece.number, report=EncodingReport())

def tried():
    return sorted(result.piece for result in tasks.in_tasks(work, pieces, Encoded))

ray.init(address="auto", logging_level="ERROR")
unavailable_storage.PERIOD_SECONDS = 0.01
pieces = [Piece(number=number, first_line=1, num_rows=1, start=0, size=1) for number in range(int(sys.argv[2]))]
told = []
numbers = unavailable_storage.retry_while_unavailable(tried, "preparing data", told.append)
print(json.dumps([numbers, [message.message for message in told]]))
"""


@pytest.mark.ray
@pytest.mark.parametrize("num_items", [1, 2])  # the first is a plain task, the second is Ray Data's
def test_an_item_that_fails_because_of_storage_is_worked_on_again(
    ray_environment: dict[str, str], tmp_path: Path, num_items: int
) -> None:
    command = [sys.executable, "-c", FAILING, str(tmp_path), str(num_items)]
    run = subprocess.run(command, env=ray_environment, check=True, timeout=300, stdout=subprocess.PIPE)
    numbers, told = json.loads(run.stdout.splitlines()[-1])
    assert numbers == list(range(num_items))
    assert "The storage is full; preparing data waits" in told[0]
    assert any("The storage does not answer; preparing data waits" in message for message in told)


def test_processes_beside_training_are_bounded_and_a_head_that_does_no_work_counts_for_none() -> None:
    head = {"Alive": True, "Resources": {"memory": 1.0}}
    worker, dead = {"Alive": True, "Resources": {"CPU": 64.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}
    assert num_processes([head, worker, dead], 4, beside=0) == 4
    assert num_processes([head], 4, beside=1) == 3
    assert num_processes([worker] * 2, 4, beside=7) == num_processes([worker], 4, beside=9) == 1
    assert num_processes([worker] * 100, 64, beside=8) == MOST_BESIDE
