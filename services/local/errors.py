"""What keeps the stack from running."""


class StackError(RuntimeError):
    """The message says why, and what to do."""
