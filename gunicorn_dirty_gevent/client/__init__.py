"""The client: what a view holds. Waits without blocking others, whatever the worker class."""

from .client import DirtyClient
from .future import DirtyFuture
from .streams import DirtyAsyncStream, DirtyStream

__all__ = ["DirtyAsyncStream", "DirtyClient", "DirtyFuture", "DirtyStream"]
