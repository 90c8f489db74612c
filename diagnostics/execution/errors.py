"""What engines raise, and the constants that they share."""

# Seconds until a scheduler must have answered, and one of its workers.
ANSWER, WORKER = 10, 60


# How often Ray starts a worker again and gives it back what it was doing; Dask's scheduler has it in its own
# configuration, with the same default.
RESTARTS = 3


class EngineError(RuntimeError):
    """Workers were lost, and with them work that could not be done again."""


def first_line(error: BaseException) -> str:
    """An error in one line; of one that quotes another's traceback the last line too, which says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
