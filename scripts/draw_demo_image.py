"""Draw the picture that `make demo` shows to the model: `python scripts/draw_demo_image.py demo/picture.png`.

A sun over hills and a little house, in flat colours; the same bytes every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = (336, 252)  # 12 x 9 tiles of 28 pixels, so 108 tokens
SKY, SUN, HILL, FIELD, WALL, ROOF, DOOR = "#8ecae6", "#ffb703", "#52796f", "#90be6d", "#f4f1de", "#bc4749", "#6f4518"


def picture() -> Image.Image:
    """The picture, RGB."""
    image = Image.new("RGB", SIZE, SKY)
    draw = ImageDraw.Draw(image)
    draw.ellipse((246, 18, 306, 78), fill=SUN)
    draw.ellipse((-60, 110, 200, 330), fill=HILL)
    draw.ellipse((130, 130, 420, 360), fill=FIELD)
    draw.rectangle((180, 130, 250, 195), fill=WALL)
    draw.polygon(((170, 132), (215, 96), (260, 132)), fill=ROOF)
    draw.rectangle((206, 160, 224, 195), fill=DOOR)
    return image


def main(path: Path) -> None:
    """Write the picture as PNG, with the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture().save(path, "PNG")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
