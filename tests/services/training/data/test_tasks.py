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


def test_processes_beside_training_are_bounded_and_a_head_that_does_no_work_counts_for_none() -> None:
    head = {"Alive": True, "Resources": {"memory": 1.0}}
    worker, dead = {"Alive": True, "Resources": {"CPU": 64.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}
    assert num_processes([head, worker, dead], 4, beside=0) == 4
    assert num_processes([head], 4, beside=1) == 3
    assert num_processes([worker] * 2, 4, beside=7) == num_processes([worker], 4, beside=9) == 1
    assert num_processes([worker] * 100, 64, beside=8) == MOST_BESIDE
