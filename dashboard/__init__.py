"""The Dash app that explores audits. It reads audits only, never a checkpoint."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dashboard.app import create_app as create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    # The command line looks into this package for its commands and must not wait for Dash.
    if name != "create_app":
        raise AttributeError(f"module 'dashboard' has no attribute {name!r}")
    from dashboard.app import create_app

    return create_app
