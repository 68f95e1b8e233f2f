"""A small HTTP client: one connection per request, closed by its owner."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Response:
    status: int
    body: bytes
    headers: dict[str, str]  # names in lower case
    elapsed: float

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Stream:
    """A response read as it comes. Leaving the block early hangs up, as a browser would."""

    def __init__(self, port: int, path: str, timeout: float) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
        try:
            self._connection.request("GET", path)
            self._response = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise
        self.status = self._response.status
        self.headers = _lower(self._response)

    def read_chunk(self, limit: int = 65536) -> bytes:
        """The bytes that are there, or the next to come; empty at the end."""
        return self._response.read1(limit)

    def chunks(self) -> Iterator[bytes]:
        while chunk := self.read_chunk():
            yield chunk

    def __iter__(self) -> Iterator[str]:
        """Lines without their ends, each as soon as it is complete."""
        while line := self._response.readline():
            yield line.decode().rstrip("\r\n")

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def request(
    port: int,
    path: str,
    timeout: float,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    started = time.monotonic()
    try:
        connection.request(method, path, body=body, headers=headers or {})
        with connection.getresponse() as response:
            content = response.read()
            elapsed = time.monotonic() - started
            return Response(response.status, content, _lower(response), elapsed)
    finally:
        connection.close()


def _lower(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}
