"""Imports Ray without drawing one of its random ids. A server imports this before any other module of Ray.

Ray seeds its generator when it draws the first id. Forks of a process that has drawn one all draw the same ids, and
two workers that store an object under the same id at once crash.
"""

import os

import ray.actor
from ray._raylet import ActorClassID, UniqueID


class _ClassIds:
    """Draws the ids of classes for `@ray.remote` from the operating system instead of Ray's generator."""

    @staticmethod
    def from_random() -> ActorClassID:
        return ActorClassID(os.urandom(ActorClassID.size()))


ray.actor.ActorClassID = _ClassIds


def has_drawn() -> bool:
    """Whether this process has drawn an id, so that its forks would draw equal ids. Then it must not fork."""
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
