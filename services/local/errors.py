"""Defines the error that the command `raydpo up` raises if PostgreSQL or Ray cannot run on this machine."""


class StackError(RuntimeError):
    """Raised if PostgreSQL or Ray cannot run on this machine. The message names the reason and the remedy."""
