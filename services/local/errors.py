"""The error of a local stack that cannot run."""


class StackError(RuntimeError):
    """The local stack cannot run. The message says why, and what to do."""
