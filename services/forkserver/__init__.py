"""Makes Python processes start fast on a Ray node, as forks of a process that has imported the large libraries already.

This process is the fork server. Importing torch, transformers and Ray costs a process ten CPU seconds; a fork costs a
tenth of a second. The module `start_ray` makes Ray start its workers with a client in place of Python. The client
passes the worker's command line, environment and open files to a fork server, and ends. If no server answers, the
client runs the command itself.

The first server does not import Ray, because Ray reads its settings, such as the job of a worker, on import. So each
Ray job has its own server: a fork of the first server, which imports Ray with the job's settings. All drivers (the main
programs of training jobs) share one more server.
"""

from pathlib import Path

VARIABLE = "RAYDPO_FORKSERVER"  # the socket path of the first server; those of other servers begin with it
# Ray sets these variables in the environment of workers.
RAYLET_VARIABLE = "RAY_RAYLET_PID"  # id of Ray's raylet process; workers end when the raylet ends
JOB_VARIABLE = "RAY_JOB_ID"


def launcher_of(path: str) -> str:
    """Returns the path of the program that Ray starts in place of Python, and that asks the fork server at the socket
    `path` for a fork."""
    return f"{path}.python"


def is_alive(pid: int) -> bool:
    """Whether the process `pid` exists and has not ended. A zombie counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
