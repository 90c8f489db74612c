"""The command as the shell runs it, in this process."""

import pytest


def shell(monkeypatch, *arguments):
    """Run the command, and give its exit code."""
    from diagnostics.cli.main import main

    monkeypatch.setattr("sys.argv", ["tunescope", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code or 0
