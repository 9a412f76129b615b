import hashlib
import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chalicelib import content, media
from chalicelib.content import Content
from chalicelib.errors import PermanentError, TransientError
from tests.shapes import AVIF, FILES, GIF, HTML, JPEG, MP3, MP4, PNG, WEBM, WEBP, picture


def identify(data):
    with Content(patience=1.0) as file:
        file.write(data)
        found = media.identify(file)
    return found.kind.ending, found.kind.content_type, found.width, found.height


def animation(kind, **options):
    stream = io.BytesIO()
    frames = [Image.new("RGB", (48, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], **options)
    return stream.getvalue()


def turned(kind):
    stream, image = io.BytesIO(), Image.new("RGB", (48, 32))
    exif = image.getexif()
    exif[274] = 6  # to be shown turned by a quarter
    image.save(stream, kind, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (PNG, ("png", "image/png", 48, 32)),
        (animation("PNG"), ("png", "image/png", 48, 32)),
        (JPEG, ("jpg", "image/jpeg", 48, 32)),
        (turned("JPEG"), ("jpg", "image/jpeg", 32, 48)),
        (WEBP, ("webp", "image/webp", 48, 32)),
        (animation("WEBP"), ("webp", "image/webp", 48, 32)),
        (GIF, ("gif", "image/gif", 48, 32)),
        (AVIF, ("avif", "image/avif", 48, 32)),
        (animation("AVIF"), ("avif", "image/avif", 48, 32)),
        (picture("BMP"), ("bmp", "image/bmp", 48, 32)),
        (picture("TIFF"), ("tiff", "image/tiff", 48, 32)),
        (picture("JPEG2000"), ("jp2", "image/jp2", 48, 32)),
        (MP4, ("mp4", "video/mp4", 48, 32)),
        ((FILES / "sound.mp4").read_bytes(), ("mp4", "video/mp4", 48, 32)),
        ((FILES / "turned.mp4").read_bytes(), ("mp4", "video/mp4", 32, 48)),
        (WEBM, ("webm", "video/webm", 48, 32)),
        ((FILES / "live.webm").read_bytes(), ("webm", "video/webm", 48, 32)),
        (MP3, ("mp3", "audio/mpeg", None, None)),
        (b"\0\0\0\x18ftypdash\0\0\0\0iso5dash" + b"\0" * 99, ("mp4", "video/mp4", None, None)),
        (PNG[:20], ("png", "image/png", None, None)),
    ],
)
def test_the_first_bytes_tell_type_and_size(data, expected):
    assert identify(data) == expected


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", HTML, b"\n <html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"PK\x03\x04zip",
     b"\x7fELF" + b"\0" * 600, b"MZ" + b"\0" * 600, b"BM is a word", b"\0\0\1\0icon", b"\xff\xfb", b"8BPS" + b"\0" * 99,
     b"\x1f\x8b\x08" + b"\0" * 600, b"SQLite format 3\0", b'{"error": "no"}', b"#!/bin/sh\n"],
)  # fmt: skip
def test_what_is_no_image_video_or_audio_is_refused(data):
    with pytest.raises(PermanentError) as caught:
        identify(data)

    assert caught.value.code == "unknown_type"


HEADS = [PNG, JPEG, WEBP, GIF, AVIF, MP4, WEBM, MP3, picture("BMP"), picture("TIFF"), picture("JPEG2000")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HEADS), st.integers(0, 400), st.binary(max_size=40), st.integers(0, 2_000))
def test_no_damaged_file_breaks_the_reader(data, at, noise, end):
    try:
        ending, _, width, height = identify((data[:at] + noise + data[at + len(noise) :])[:end])
    except PermanentError:
        return
    assert ending
    assert (width is None) == (height is None)


def test_boxes_that_never_end_are_not_walked_for_ever():
    boxes = b"".join(struct.pack(">I4s", 8, b"moov") for _ in range(200_000))

    assert identify(b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + boxes)[2:] == (None, None)


def test_a_file_is_counted_and_hashed_as_it_is_written():
    with Content(patience=1.0) as file:
        for _ in range(100):
            file.write(b"0123456789")

        assert file.size == 1_000
        assert file.sha256 == hashlib.sha256(b"0123456789" * 100).digest()
        assert file.md5 == hashlib.md5(b"0123456789" * 100).digest()
        file.file.seek(0)
        assert file.file.read() == b"0123456789" * 100


def test_a_file_over_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(content, "MAX_BYTES", 1_000)
    with Content(patience=1.0) as file:
        file.write(b"x" * 1_000)
        with pytest.raises(PermanentError) as caught:
            file.write(b"x")

    assert caught.value.code == "result_too_large"


def test_large_files_wait_for_one_another(monkeypatch):
    monkeypatch.setattr(content, "SMALL_BYTES", 1_000)
    with Content(patience=0.0) as first, Content(patience=0.01) as second:
        first.write(b"x" * 1_001)
        second.write(b"x" * 1_000)
        with pytest.raises(TransientError) as caught:
            second.write(b"x")
        assert caught.value.code == "result_no_room"

    with Content(patience=0.0) as third:
        third.write(b"x" * 1_001)


def test_a_full_disk_is_no_fault_of_the_file(monkeypatch):
    with Content(patience=1.0) as file:

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(file.file, "write", full)
        with pytest.raises(TransientError) as caught:
            file.write(b"x")

    assert caught.value.code == "result_no_room"
