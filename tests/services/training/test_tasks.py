import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, time
import ray
from services.training import tasks
from services.training.encoding import Encoded, Piece
from services.training.report import EncodingReport

def work(piece):
    time.sleep(1)
    return Encoded(piece=piece.number, report=EncodingReport(), limit=os.getpid())

ray.init(address="auto", logging_level="ERROR")
tasks.TASKS_PER_PROCESS = 1
pieces = [Piece(number=number, first_line=1, num_rows=1, start=0, size=1) for number in range(3 * os.cpu_count())]
came = []
for result in tasks.in_tasks(work, pieces, Encoded):
    came.append((result.piece, result.limit, time.time()))
print(json.dumps(came))
"""


@pytest.mark.ray
def test_each_item_is_worked_on_once_and_its_result_awaits_no_other_of_its_task(
    ray_environment: dict[str, str],
) -> None:
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=ray_environment, check=True, timeout=200, stdout=subprocess.PIPE)
    came = json.loads(run.stdout.splitlines()[-1])
    assert sorted(number for number, _, _ in came) == list(range(len(came)))
    at = {number: seconds for number, _, seconds in came}
    assert at[0] < at[1] - 0.5 < at[2] - 1, "one task's items, a second each"
