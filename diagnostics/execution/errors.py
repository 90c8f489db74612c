"""Errors and timeouts that the engines share."""

# How long a scheduler, and one of its workers, may take to answer.
CONNECT_SECONDS, WORKER_SECONDS = 10, 60

# Restarts of a lost worker, with its unfinished work. Dask has its own setting; its default is the same.
RESTARTS = 3


class EngineError(RuntimeError):
    """Workers were lost, with work that could not be repeated."""


def first_line(error: BaseException) -> str:
    """The first line of an error; where it quotes a traceback, also the last line, which has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
