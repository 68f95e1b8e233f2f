"""The client: what a view holds. Waits without blocking others, whatever the worker class."""

# First: where `install` has been called, this puts our client in its place, and so loads the modules below.
import gunicorn.dirty  # noqa: F401

from .client import DirtyClient
from .future import DirtyFuture
from .streams import DirtyAsyncStream, DirtyStream

__all__ = ["DirtyAsyncStream", "DirtyClient", "DirtyFuture", "DirtyStream"]
