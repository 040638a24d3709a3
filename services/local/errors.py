"""Defines the error for a local stack (PostgreSQL and Ray on this machine) that cannot run."""


class StackError(RuntimeError):
    """Raised if PostgreSQL or Ray cannot run on this machine. The message names the reason and the remedy."""
