"""Sudokus, solved for FastAPI views under gunicorn's asgi worker."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from gunicorn.dirty import DirtyError, DirtyTimeoutError, get_dirty_client_async
from pydantic import BaseModel, Field

from gunicorn_dirty_gevent import DirtyOverloadedError

log = logging.getLogger("gunicorn.error")
app = FastAPI(title="Sudoku")
CELLS = r"^[0-9.]{81}$"  # row by row; an empty cell is a dot or 0


class Puzzle(BaseModel):
    puzzle: str = Field(pattern=CELLS)


class Solution(BaseModel):
    solution: str


@app.post("/solve")
async def solve(asked: Puzzle) -> Solution:
    client = await get_dirty_client_async()
    solution = await client.execute_async("tasks:Sudoku", "solve", asked.puzzle)
    if solution is None:
        raise HTTPException(422, "this puzzle has no solution")
    return Solution(solution=solution)


@app.get("/steps")
async def steps(puzzle: Annotated[str, Query(pattern=CELLS)]) -> StreamingResponse:
    """The search as server-sent events."""
    client = (await get_dirty_client_async()).options(timeout=120)  # for the whole stream; 30 by default
    chunks = client.stream_async("tasks:Sudoku", "steps", puzzle)
    first = await anext(chunks)  # sends the call: what goes wrong by now gets a status of its own
    headers = {"Cache-Control": "no-cache"}
    return StreamingResponse(events(first, chunks), media_type="text/event-stream", headers=headers)


async def events(first: dict, chunks) -> AsyncIterator[str]:
    async with chunks:  # closed when the browser leaves, and the search with it
        try:
            yield f"data: {json.dumps(first)}\n\n"
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
        except DirtyError as error:  # the status line has gone out
            log.warning("a search ended early: %s", error.message)
            yield f"event: failed\ndata: {json.dumps(error.message)}\n\n"


@app.exception_handler(DirtyOverloadedError)
async def overloaded(request: Request, error: DirtyOverloadedError) -> JSONResponse:
    return JSONResponse({"detail": "too many puzzles are waiting"}, 503, {"Retry-After": "5"})


@app.exception_handler(DirtyTimeoutError)
async def too_slow(request: Request, error: DirtyTimeoutError) -> JSONResponse:
    return JSONResponse({"detail": error.message}, 504)


@app.exception_handler(DirtyError)
async def failed(request: Request, error: DirtyError) -> JSONResponse:
    log.error("the dirty app failed: %s", error.message)
    return JSONResponse({"detail": "the solver failed"}, 502)
