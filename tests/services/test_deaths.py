"""Tests what users are told of real messages of the installed Ray about processes that died."""

import pytest

from services.deaths import cause_in

OUT_OF_MEMORY = """Traceback (most recent call last):
  File "driver.py", line 89, in <module>
ray.exceptions.OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory. Memory on the node \
(IP: 192.0.2.2, ID: 733dd419233787301c9b9cc5ec1f264c14b48191638d1709) was 22.41GB used / 23.54GB limit (0.951997)
OOM kill reason: Memory usage 24062759936B exceeded threshold of 24012684784B (95.0% of 25276510208B limit)
Object store memory usage: [- objects spillable: 0
(global lru) bytes evicted: 0]
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(99d9f664e0b92b7e611f13cb01000000): job ID=01000000, lease ID=000000009bb254340c03, \
task name=A.__init__, required resources={}, pid=507, actual memory used=0.14GB, worker ID=917c039ee0880fe26208849749a)
(Actor(1f613b9c4c2b1b0b7e611f13cb01000000): job ID=01000000, pid=508, actual memory used=0.05GB, worker ID=917c039ee0)
]
Total non-selected idle workers: 0
Total non-selected idle workers USS bytes: 0.00GB
To see more information about memory usage on this node, use `ray logs raylet.out -ip 192.0.2.2`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
512\t19.17\tpython neighbour.py --token=secret
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/."""

LOST_NODE = """ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
The actor died because its node has died. Node Id: 733dd419233787301c9b9cc5ec1f264c14b48191638d1709abf98948"""
CRASHED = """ray.exceptions.WorkerCrashedError: The worker died unexpectedly while executing this task.
Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process \
was killed by the OOM killer due to high memory usage, (2) ray stop --force was called"""
REFUSED = """OSError: When reading information for key 'runs/1' in bucket 'b': AWS Error ACCESS_DENIED during \
HeadObject operation: No response body."""
MEMORY = "memory ran out on the node 192.0.2.2: 22.41 GB of 23.54 GB were in use"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (OUT_OF_MEMORY, f"{MEMORY}; Ray killed processes that held 0.14 GB"),
        ("\n".join(OUT_OF_MEMORY.splitlines()[-3:]), "memory ran out on the node, and Ray killed processes of the job"),
        (f"2026 ERROR commands: The reporter has ended, and the attempt with it: {MEMORY}\nstopped", MEMORY),
        (LOST_NODE, "a node that it ran on was lost"),
        (CRASHED, "one of its processes was killed or crashed without a message, which often means that memory"),
        (
            REFUSED,
            "storage refused access: OSError: When reading information for key 'runs/1' in bucket 'b': AWS Error",
        ),
        (
            "PermissionError: [Errno 13] Permission denied: '/s/run'",
            "storage refused access: PermissionError: [Errno 13]",
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free",
        ),
        ("KeyError: 1\n\nDuring handling\nValueError: no config.json\nbye", "ValueError: no config.json"),
    ],
)
def test_of_a_long_text_the_cause_is_told(text: str, told: str) -> None:
    assert (cause_in(text) or "").startswith(told)


def test_what_others_run_on_the_node_is_told_to_no_user() -> None:
    assert "neighbour" not in str(cause_in(OUT_OF_MEMORY))
    assert cause_in("all is well") is None
