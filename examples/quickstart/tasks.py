"""The dirty app: picture work that would hold up an HTTP worker.

Nothing in this file knows of gunicorn_dirty_gevent; it is written for gunicorn's own dirty arbiter.
"""

import base64
import io

from gunicorn.dirty import DirtyApp
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

MAX_WIDTH = 2000  # as wide as a thumbnail may get: 2000 x 2000 pixels are 12 MB of memory


class ImageApp(DirtyApp):
    def init(self):
        """Prepare, once in each dirty worker, what every call uses and none changes."""
        # The mark stamped on every thumbnail: letters as a mask, drawn large and scaled to fit.
        font = ImageFont.load_default()
        left, top, right, bottom = font.getbbox("quickstart")
        mark = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
        ImageDraw.Draw(mark).text((1 - left, 1 - top), "quickstart", font=font, fill=255)
        self.mark = mark.resize((mark.width * 4, mark.height * 4), Image.Resampling.LANCZOS)
        # The tones of the contact sheet: for each, a table with a new value per channel and level.
        self.tones = {
            "plain": [v for _ in range(3) for v in range(256)],
            "bright": [round(255 * (v / 255) ** 0.6) for _ in range(3) for v in range(256)],
            "dark": [round(255 * (v / 255) ** 1.7) for _ in range(3) for v in range(256)],
            "warm": [min(255, round(v * k)) for k in (1.15, 1.0, 0.8) for v in range(256)],
            "cool": [min(255, round(v * k)) for k in (0.8, 1.0, 1.2) for v in range(256)],
            "negative": [255 - v for _ in range(3) for v in range(256)],
        }

    def thumbnail(self, picture, width):
        """The picture (bytes) as a JPEG (bytes) of that width, marked in its lower right corner."""
        if not 16 <= width <= MAX_WIDTH:
            raise ValueError(f"width must be from 16 to {MAX_WIDTH}, not {width}")
        image = _open(picture)
        height = max(1, round(image.height * width / image.width))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = image.filter(ImageFilter.UnsharpMask(radius=1, percent=60))
        mark = ImageOps.contain(self.mark, (max(1, width // 3), max(1, height // 10)))
        corner = (width - mark.width - width // 40, height - mark.height - height // 40)
        image.paste((255, 255, 255), corner, mark)
        return _jpeg(image)

    def histogram(self, picture, bins):
        """How many pixels of each channel fall in each of so many equal bins."""
        if not 1 <= bins <= 256:
            raise ValueError(f"bins must be from 1 to 256, not {bins}")
        image = _open(picture)
        levels = image.histogram()
        answer = {"width": image.width, "height": image.height}
        for number, channel in enumerate(("red", "green", "blue")):
            counts = [0] * bins
            for level, pixels in enumerate(levels[number * 256 : number * 256 + 256]):
                counts[level * bins // 256] += pixels
            answer[channel] = counts
        return answer

    def contact_sheet(self, picture, width):
        """A stream: says which cell is done after each, and ends with the whole sheet (base64)."""
        if not 16 <= width <= MAX_WIDTH // 3:
            raise ValueError(f"width must be from 16 to {MAX_WIDTH // 3}, not {width}")
        image = _open(picture)
        height = max(1, round(image.height * width / image.width))
        cell = image.resize((width, height), Image.Resampling.LANCZOS)
        sheet = Image.new("RGB", (width * 3, height * 2))
        for number, (tone, table) in enumerate(self.tones.items()):
            sheet.paste(cell.point(table), (number % 3 * width, number // 3 * height))
            yield {"tone": tone, "done": number + 1, "of": len(self.tones)}
        yield {"sheet": base64.b64encode(_jpeg(sheet)).decode("ascii")}


def _open(picture):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")


def _jpeg(image):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
