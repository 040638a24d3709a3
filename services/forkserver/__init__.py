"""A fork server on a Ray node: workers, drivers and engines start as forks of a process that has done their imports.

Importing torch, transformers and Ray costs a process ten CPU seconds; a fork costs a tenth of one. `start_ray` makes
Ray start its workers with a client in place of Python. The client passes the worker's command line, environment and
open files to a server, and ends. If no server answers, the client runs the command itself.

The first server does not import Ray, because Ray reads its settings, such as a worker's job, on import. So each Ray
job has its own server, a fork of the first that imports Ray with the job's settings. All drivers share another one.
"""

from pathlib import Path

VARIABLE = "RAYDPO_FORKSERVER"  # the path of the first server's socket; the others' paths begin with it
# Variables of Ray.
RAYLET_VARIABLE = "RAY_RAYLET_PID"  # workers end when this process ends
JOB_VARIABLE = "RAY_JOB_ID"


def launcher_of(path: str) -> str:
    """Returns the path of the program that acts as Python and asks the server at `path`."""
    return f"{path}.python"


def is_alive(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
