import base64

import pytest

from chalicelib import outputs
from chalicelib.errors import PermanentError
from chalicelib.outputs import Link, Picture
from tools.cloud.render import draw

PNG = draw("a cat")
TEXT = base64.b64encode(PNG).decode()
DATA_URL = f"data:image/png;base64,{TEXT}"
URL = "https://results.example/a.png"


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ({"images": [{"filename": "ComfyUI_00001_.png", "type": "base64", "data": TEXT}]}, Picture(PNG)),
        ({"images": [{"filename": "x.png", "type": "s3_url", "data": URL}]}, Link(URL)),
        ({"images": [DATA_URL], "image_url": DATA_URL, "seed": 42}, Picture(PNG)),
        ({"message": TEXT, "status": "success"}, Picture(PNG)),
        ({"message": "Image generated successfully", "image": TEXT}, Picture(PNG)),
        ({"image_url": URL, "cost": 0.02}, Link(URL)),
        ([{"image": URL, "seed": 2}], Link(URL)),
        ([URL], Link(URL)),
        (TEXT, Picture(PNG)),
        (DATA_URL, Picture(PNG)),
        (URL, Link(URL)),
        (TEXT[:60] + "\n" + TEXT[60:].rstrip("="), Picture(PNG)),
    ],
)
def test_the_first_picture_is_found(output, found):
    assert outputs.find(output) == found


NESTED = "x"
for _ in range(10_000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "output",
    [
        None, {}, [], "", "done", 7, True, {"images": []}, {"message": "the image does not exist"}, {"data": 3},
        {"parameters": {"image": TEXT}}, {"input": {"image": TEXT}}, {"image": "/tmp/out.png"},
        {"image": "aGVsbG8="}, {"image": "data:image/png;base64,###"}, {"image": "file:///etc/passwd"}, NESTED,
    ],
)  # fmt: skip
def test_no_picture_is_an_error_that_says_so(output):
    with pytest.raises(PermanentError) as caught:
        outputs.find(output)

    assert caught.value.code == "no_output"


@pytest.mark.parametrize(
    ("head", "ending", "content_type"),
    [
        (PNG, "png", "image/png"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 300, "jpg", "image/jpeg"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + b"\0" * 300, "webp", "image/webp"),
        (b"GIF89a" + b"\0" * 300, "gif", "image/gif"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2mp41" + b"\0" * 300, "mp4", "video/mp4"),
    ],
)
def test_the_type_is_told_by_the_first_bytes(head, ending, content_type):
    kind = outputs.identify(head)

    assert (kind.ending, kind.content_type) == (ending, content_type)


@pytest.mark.parametrize("content", [b"", b"hello", b"<!DOCTYPE html><html>", b"%PDF-1.7", b"PK\x03\x04zip"])
def test_what_is_no_picture_is_refused(content):
    with pytest.raises(PermanentError) as caught:
        outputs.identify(content)

    assert caught.value.code == "unknown_type"
