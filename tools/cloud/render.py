"""Draws a prompt as a PNG, so that a picture can be told from another by looking at it."""

import colorsys
import hashlib
import io
import unicodedata
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

SIZE = 512
MARGIN = 40
FRAME = 12
FONT = Path(__file__).parent / "font" / "Sarabun-Regular.ttf"  # has Thai and Latin letters; licence beside it
FONT_SIZES = (44, 34, 26, 20, 15)


@lru_cache(maxsize=64)
def draw(prompt: str) -> bytes:
    """The picture of a prompt; always the same one, byte for byte."""
    picture = Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB")
    tint = Image.new("RGB", (SIZE, SIZE), _colour(_hue(prompt), 0.35))
    return _written(Image.blend(picture, tint, 0.8), prompt)


def draw_over(prompt: str, under: bytes) -> bytes:
    """The prompt over a picture, darker and in a frame, so that one sees what it was. Raises ValueError: it is none."""
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(under))).convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever they come upon
        raise ValueError("it is no picture that can be read") from error
    picture = ImageOps.fit(picture, (SIZE, SIZE)).point(lambda value: value * 2 // 3)
    ImageDraw.Draw(picture).rectangle((0, 0, SIZE - 1, SIZE - 1), outline=_colour(_hue(prompt), 0.9), width=FRAME)
    return _written(picture, prompt)


def _written(picture: Image.Image, prompt: str) -> bytes:
    """The picture as a PNG, with the prompt on it."""
    lines, font = _fit(prompt.strip() or "(no prompt)")
    height = font.size * 1.6
    top = (SIZE - height * len(lines)) / 2
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        pen.text((SIZE / 2, top + number * height), line, font=font, fill="white", anchor="ma")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _hue(prompt: str) -> float:
    return hashlib.sha256(prompt.encode("utf-8", "replace")).digest()[0] / 256


def _colour(hue: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.7, value)
    return int(red * 255), int(green * 255), int(blue * 255)


def _fit(text: str) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """The lines in the largest letters in which all of them fit; in the smallest, as many as fit."""
    for size in FONT_SIZES:
        font = ImageFont.truetype(str(FONT), size)
        room = int((SIZE - 2 * MARGIN) / (size * 1.6))
        lines = _wrap(text[:2_000], font)
        if len(lines) <= room:
            break
    return lines[:room], font


def _wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than the picture, broken at spaces, or anywhere but before a mark where there are none (Thai)."""
    lines, line = [], ""
    for character in " ".join(text.split()):
        if font.getlength(line + character) <= SIZE - 2 * MARGIN or _clings(character):
            line += character
            continue
        head, space, tail = line.rpartition(" ")
        lines.append(head if space else line)
        line = (tail if space else "") + character
    return [*lines, line.strip()]


def _clings(character: str) -> bool:
    """Marks, and the Thai vowels that follow their consonant, never begin a line."""
    return unicodedata.category(character) == "Mn" or character in "ะาำ"
