"""A fork server on a Ray node: workers, drivers and engines start as forks of a process that has their imports done.

Imports of torch, transformers and Ray cost a process ten CPU seconds; a fork costs it a tenth of one. `start_ray`
gives Ray another Python to start its workers with, a client that hands the worker's command line, environment and
open files to a server, and ends. Where no server answers, the client runs the command itself.

The first server knows nothing of Ray, whose library reads its settings, such as a worker's job, when it is loaded.
So each of Ray's jobs has a server of its own, a fork of the first that imports Ray with the settings of that job, and
drivers have one.
"""

from pathlib import Path

VARIABLE = "RAYDPO_FORKSERVER"  # the path of the first server's socket; the others' paths begin with it
# Ray's own.
RAYLET_VARIABLE = "RAY_RAYLET_PID"  # the process with whose end a worker ends
JOB_VARIABLE = "RAY_JOB_ID"


def launcher_of(path: str) -> str:
    """The Python that asks the server at `path`."""
    return f"{path}.python"


def lives(pid: int) -> bool:
    """Whether it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
