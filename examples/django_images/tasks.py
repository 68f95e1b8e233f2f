"""The dirty app: thumbnails of an uploaded picture, one after the other."""

import io
from collections.abc import Iterator

from gunicorn.dirty import DirtyApp
from PIL import Image, ImageFilter, ImageOps

WIDTHS = (1600, 800, 400, 200, 100)
Image.MAX_IMAGE_PIXELS = 20_000_000  # Pillow refuses twice as many: a small file can be a huge picture


class Thumbnails(DirtyApp):
    def init(self) -> None:
        Image.init()  # load Pillow's formats now, not in the first call

    def make(self, picture: bytes) -> Iterator[dict[str, object]]:
        """A stream: the picture's size, then each thumbnail as a JPEG as soon as it is done.

        Or one chunk that says why there is none: a user's mistake is an answer, and no error in the log.
        """
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")
        except Image.DecompressionBombError:
            yield {"refused": "the picture has too many pixels"}
            return
        except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken files
            yield {"refused": "this is not a picture"}
            return
        yield {"width": image.width, "height": image.height, "of": len(WIDTHS)}
        for done, width in enumerate(WIDTHS, 1):
            height = max(1, round(image.height * width / image.width))
            small = image.resize((width, height), Image.Resampling.LANCZOS)
            small = small.filter(ImageFilter.UnsharpMask(radius=1, percent=60))
            out = io.BytesIO()
            small.save(out, "JPEG", quality=85)
            yield {"done": done, "of": len(WIDTHS), "width": width, "height": height, "jpeg": out.getvalue()}
