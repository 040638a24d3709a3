"""Imports Ray in a fork server without drawing one of Ray's random ids. No other module of Ray may be imported earlier.

Ray seeds its random generator when it draws the first id. All forks of a process that has drawn an id draw the same
ids, and two workers crash if they store objects under the same id at the same time.
"""

import os

import ray.actor
from ray._raylet import ActorClassID, UniqueID


class _ClassIds:
    """Draws the ids of `@ray.remote` classes from the operating system's random generator instead of Ray's own."""

    @staticmethod
    def from_random() -> ActorClassID:
        return ActorClassID(os.urandom(ActorClassID.size()))


ray.actor.ActorClassID = _ClassIds


def has_drawn() -> bool:
    """Whether this process has drawn one of Ray's random ids.

    A process that has drawn one must not fork, because its forks would draw equal ids.
    """
    first, second = _drawn_in_a_fork(), _drawn_in_a_fork()
    return first == second


def _drawn_in_a_fork() -> bytes:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, UniqueID.from_random().binary())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with open(reading, "rb") as drawn:
        return drawn.read()
