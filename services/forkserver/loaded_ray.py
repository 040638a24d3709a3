"""A server imports this before anything else of Ray, so that it draws none of Ray's random ids.

Ray's library seeds its generator when the first id is drawn. Forks of a process that has drawn one draw the same ids as
each other, and two workers that store an object under one id at once crash.
"""

import os

import ray.actor
from ray._raylet import ActorClassID, UniqueID


class _ClassIds:
    """`@ray.remote` asks this for the id of a class. It draws from the system, and not from Ray's generator."""

    @staticmethod
    def from_random() -> ActorClassID:
        return ActorClassID(os.urandom(ActorClassID.size()))


ray.actor.ActorClassID = _ClassIds


def has_drawn() -> bool:
    """Whether forks of this process draw the same ids, so that it must not be forked."""
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
