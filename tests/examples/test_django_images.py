"""examples/django_images: upload, progress, thumbnails."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import ANSWER, EXAMPLES, needs, served, stops_clean
from support.gunicorn import Gunicorn, Response

pytestmark = [needs("django"), needs("PIL")]

BOUNDARY = "a-line-that-is-in-no-picture"


def upload(gunicorn: Gunicorn, content: bytes, name: str = "picture") -> Response:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return gunicorn.request("/thumbnails", ANSWER, "POST", body, headers)


def plain_picture(colour: str, size: tuple[int, int] = (300, 200), kind: str = "PNG") -> bytes:
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def opened(chunk: dict[str, Any]) -> Any:
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(chunk["jpeg"])))
    image.load()
    return image


def test_thumbnails_of_an_uploaded_picture_come_one_by_one() -> None:
    with served("django_images") as gunicorn:
        assert '<input type="file"' in gunicorn.get("/", timeout=ANSWER).text

        answer = upload(gunicorn, (EXAMPLES / "quickstart" / "picture.jpg").read_bytes())
        assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
        first, *thumbnails = [json.loads(line) for line in answer.text.splitlines()]
        assert first == {"width": 1200, "height": 800, "of": 5}
        assert [chunk["done"] for chunk in thumbnails] == [1, 2, 3, 4, 5]
        assert [opened(chunk).width for chunk in thumbnails] == [1600, 800, 400, 200, 100]

        # At once, each its own.
        colours = {"red": (254, 0, 0), "blue": (0, 0, 254), "lime": (0, 255, 1), "white": (255, 255, 255)}
        with ThreadPoolExecutor(len(colours)) as pool:
            answers = list(pool.map(lambda colour: upload(gunicorn, plain_picture(colour)), colours))
        for (colour, rgb), answer in zip(colours.items(), answers, strict=True):
            last = opened(json.loads(answer.text.splitlines()[-1]))
            assert last.getpixel((50, 30)) == pytest.approx(rgb, abs=3), colour

        for content in (b"no picture", plain_picture("red")[:60]):
            answer = upload(gunicorn, content)
            assert (answer.status, answer.text) == (400, "this is not a picture\n")
        answer = upload(gunicorn, plain_picture("red", (7000, 6000)))
        assert (answer.status, answer.text) == (400, "the picture has too many pixels\n")
        assert upload(gunicorn, b"x", name="other").status == 400
        assert upload(gunicorn, bytes(10 * 1024 * 1024 + 1)).status == 413
        assert gunicorn.get("/thumbnails", timeout=ANSWER).status == 405
        stops_clean(gunicorn)
