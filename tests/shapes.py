"""
What RunPod's workers answer, one row a shape, and what must become of it.

A row has a name, the `output` of a COMPLETED run, and either the files in it, in order, each as its bytes or as the
link to them, with the codes of the warnings beside them; or the code of the error that the job ends with.
"""

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

FILES = Path(__file__).parent / "files"


def picture(kind: str, colour: str = "red", size: tuple[int, int] = (48, 32)) -> bytes:
    """A picture in one of Pillow's formats."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{b64(content)}"


PNG, PNG_2, PNG_3 = (picture("PNG", colour) for colour in ("red", "green", "blue"))
JPEG, WEBP, GIF, AVIF = (picture(kind) for kind in ("JPEG", "WEBP", "GIF", "AVIF"))
MP4, WEBM, MP3 = ((FILES / name).read_bytes() for name in ("red.mp4", "red.webm", "tone.mp3"))

# What lies where the links point to; the content decides, whatever the name says.
LINKS = {
    "https://results.example/a.png": PNG,
    "https://results.example/b.png": PNG_2,
    "https://results.example/a.jpg?X-Amz-Expires=604800&X-Amz-Signature=abc": JPEG,
    "https://image.example/clip.mp4": MP4,
    "https://image.example/clip.webm": WEBM,
    "https://image.example/tone": MP3,
    "https://results.example/abc123": WEBP,
    "https://image.example/a.m4a": MP3,
    "https://image.example/signed.mp4?sig=abc": MP4,
    "https://results.example/my%20cat.png": PNG_3,
    "https://image.example/page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
}
A_PNG, B_PNG, A_JPG, A_MP4, A_WEBM, A_MP3, X, _, SIGNED_MP4, _, A_PAGE = LINKS
HTML = b"<!DOCTYPE html><html><body>" + b"not found " * 900 + b"</body></html>"


@dataclass(frozen=True)
class Row:
    name: str
    output: Any
    files: list[bytes | str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def is_told_by_a_link(self) -> bool:
        """Whether the end depends on what is behind a link."""
        return any(link in json.dumps(self.output) for link in (A_PAGE, "http://127.0.0.1:8888"))


ROWS = [
    # worker-comfyui
    Row("comfyui base64", {"images": [{"filename": "C_1_.png", "type": "base64", "data": b64(PNG)}]}, [PNG]),
    Row("comfyui link", {"images": [{"filename": "C_1_.png", "type": "s3_url", "data": A_PNG}]}, [A_PNG]),
    Row(
        "comfyui several",
        {"images": [{"filename": f"C_{n}_.png", "type": "base64", "data": b64(c)} for n, c in enumerate([PNG, PNG_2])]},
        [PNG, PNG_2],
    ),
    Row(
        "comfyui partial success",
        {"images": [{"filename": "C.png", "type": "base64", "data": b64(PNG)}], "errors": ["Node 7 failed"]},
        [PNG],
        ["worker_failed"],
    ),
    Row("comfyui without image", {"status": "success_no_images", "images": []}, error="no_output"),
    Row("comfyui native file name", {"images": [{"filename": "C.png", "subfolder": "", "type": "output"}]},
        error="local_path"),
    Row("comfyui 4 base64", {"message": b64(PNG), "status": "success"}, [PNG]),
    Row("comfyui 4 link", {"message": A_PNG, "status": "success"}, [A_PNG]),
    Row("comfyui 4 failure", {"status": "error", "message": "the image does not exist in the folder: /comfyui/output"},
        error="worker_failed"),
    Row("comfyui video nodes", {"gifs": [{"filename": "a.mp4", "type": "base64", "data": b64(MP4)}]}, [MP4]),
    # worker-sdxl, sdxl-turbo
    Row("sdxl data URLs", {"images": [data_url(PNG)], "image_url": data_url(PNG), "seed": 42}, [PNG]),
    Row("sdxl several", {"images": [data_url(PNG), data_url(PNG_2)], "image_url": data_url(PNG), "seed": 1},
        [PNG, PNG_2]),
    Row("sdxl with bucket", {"images": [A_JPG], "image_url": A_JPG, "seed": 42}, [A_JPG]),
    Row("sdxl-turbo", {"images": [{"image": b64(PNG), "seed": None}], "generation_time": 0.4, "parameters": {}}, [PNG]),
    # A1111
    Row(
        "a1111",
        {"images": [b64(PNG)], "parameters": {"init_images": [b64(PNG_2)]}, "info": json.dumps({"prompt": "a cat"})},
        [PNG],
    ),
    Row("a1111 several", {"images": [b64(PNG), b64(PNG_2), b64(PNG_3)], "info": "{}"}, [PNG, PNG_2, PNG_3]),
    # RunPod's samples and public endpoints
    Row("list of links in objects", [{"image": A_PNG, "seed": 2}], [A_PNG]),
    Row("list of base64 in objects", [{"image": b64(PNG), "seed": 2}, {"image": b64(PNG_2), "seed": 3}], [PNG, PNG_2]),
    Row("list of links", [A_PNG, B_PNG], [A_PNG, B_PNG]),
    Row("public endpoint image_url", {"image_url": A_PNG, "cost": 0.02}, [A_PNG]),
    Row("public endpoint result", {"result": A_PNG, "cost": 0.03}, [A_PNG]),
    Row("public endpoint video_url", {"video_url": A_MP4, "cost": 0.3}, [A_MP4]),
    Row("public endpoint url", {"url": A_PNG}, [A_PNG]),
    Row("public endpoint bare link", A_MP4, [A_MP4]),
    Row("public endpoint audio_url", {"audio_url": A_MP3, "cost": 0.01}, [A_MP3]),
    Row("public endpoint failure", {"status": "error", "message": "NSFW content"}, error="worker_failed"),
    # others
    Row(
        "flux twice the same",
        {"image": b64(PNG), "data_url": data_url(PNG), "status": "success", "message": "Image generated successfully"},
        [PNG],
    ),
    Row("image_base64", {"image_base64": b64(PNG), "message": "ok"}, [PNG]),
    Row("fooocus", [{"base64": b64(PNG), "url": "http://localhost:8888/files/a.png", "seed": "7"}], [PNG]),
    Row("filename and image", {"images": [{"filename": "../../a.png", "image": b64(PNG)}]}, [PNG]),
    Row("list of image_base64", [{"image_base64": b64(PNG)}, {"image_base64": b64(PNG_2)}], [PNG, PNG_2]),
    Row("list of url", [{"url": A_PNG}, {"url": B_PNG}], [A_PNG, B_PNG]),
    Row("image in an object", {"image": {"data": b64(PNG)}}, [PNG]),
    Row("openai b64_json", {"created": 1, "data": [{"b64_json": b64(PNG)}]}, [PNG]),
    Row("nested output", {"output": {"images": [b64(PNG)]}}, [PNG]),
    Row("an unknown name", {"picture_of_the_day": {"bytes_base64_encoded": b64(PNG)}}, [PNG]),
    Row("a name nobody knows", {"zxcv": b64(PNG)}, [PNG]),
    Row("JSON in a text", json.dumps({"images": [b64(PNG)]}), [PNG]),
    Row("link in capitals and spaces", {"image_url": " HTTPS://results.example/a.png\n"},
        ["HTTPS://results.example/a.png"]),
    Row("a name that says nothing around it", {"response": {"image_url": X}}, [X]),
    Row("a list under one", {"prediction": {"output": [X, A_PNG]}}, [X, A_PNG]),
    Row("by the numbers of the nodes",
        {"outputs": {"9": {"images": [{"url": X}]}, "12": {"images": [{"data": b64(PNG)}]}}}, [X, PNG]),
    Row("numbered names", {"image1": A_PNG, "image_2": b64(PNG_3), "output0": B_PNG}, [A_PNG, PNG_3, B_PNG]),
    Row("images by number", {"images": {"0": A_PNG, "1": B_PNG}}, [A_PNG, B_PNG]),
    Row("images by number, and an error", {"images": {"0": b64(PNG)}, "errors": ["node 7"]}, [PNG], ["worker_failed"]),
    Row("camel case", {"generatedImage": b64(PNG), "imageUrl": B_PNG, "videoURL": A_MP4}, [PNG, A_MP4]),
    Row("openai chat", {"choices": [{"message": {"images": [{"image_url": {"url": X}}]}}]}, [X]),
    Row("gemini",
        {"candidates": [{"content": {"parts": [{"inlineData": {"mimeType": "image/png", "data": b64(PNG)}}]}}]}, [PNG]),
    Row("a link with no name for it at all", {"video_out": X}, [X]),
    Row("sound under its own name", {"speech": "https://image.example/a.m4a"}, ["https://image.example/a.m4a"]),
    Row("links in one text", {"images": f"{A_PNG}\n{B_PNG},{A_MP4}"}, [A_PNG, B_PNG, A_MP4]),
    Row("a link in a sentence", {"message": f"Uploaded to {A_PNG}"}, [A_PNG]),
    Row("markdown", {"text": f"![a cat]({A_PNG})"}, [A_PNG]),
    Row("a link with a space", {"url": "https://results.example/my cat.png"}, ["https://results.example/my%20cat.png"]),
    Row("JSON in a text inside", {"statusCode": 200, "body": json.dumps({"image": b64(PNG)})}, [PNG]),
    Row("a list of JSON in texts", [json.dumps({"step": 1}), "\n" + json.dumps({"image": b64(PNG)})], [PNG]),
    Row("bytes as Python writes them", {"image": f"b'{b64(PNG)}'"}, [PNG]),
    Row("base64 in quotes", {"image": json.dumps(b64(PNG))}, [PNG]),
    Row("data URL in capitals", {"image": "DATA:IMAGE/PNG;BASE64," + b64(PNG)}, [PNG]),
    Row("half a data URL", {"image": "image/png;base64," + b64(PNG)}, [PNG]),
    # what stands beside it
    Row("a model's page", {"restored": b64(PNG), "model_url": "https://models.example/x"}, [PNG]),
    Row("a manual", {"wav": b64(MP3), "docs_url": "https://docs.example/x"}, [MP3]),
    Row("a queue's addresses",
        {"images": [{"url": A_PNG}], "status_url": X, "response_url": X, "cancel_url": X}, [A_PNG]),
    Row("numbers without end", {"latents": [0.5] * 150_000, "nodes": {"9": {"images": [b64(PNG)]}}}, [PNG]),
    Row("progress without end", [{"progress": n} for n in range(25_000)] + [{"image": b64(PNG)}], [PNG]),
    Row("its folder", {"images": [b64(PNG)], "output_dir": "/workspace/out", "file_names": ["a.png"]}, [PNG]),
    Row("poster inline, video behind a link", {"image": b64(PNG), "url": A_MP4}, [PNG, A_MP4]),
    Row("poster inline, video behind a signed link", {"image": b64(PNG), "url": SIGNED_MP4}, [PNG, SIGNED_MP4]),
    Row("a link that nothing calls a file, beside one", {"zxcv": X, "image_url": A_PNG}, [A_PNG]),
    Row("frame inline, video behind a link", {"frame": b64(PNG), "output": A_MP4}, [PNG, A_MP4]),
    Row("inline, and where it lies", {"image": b64(PNG), "url": "https://gone.example/abc"}, [PNG]),
    Row("numbered, inline and link", {"image_1": b64(PNG), "image_2": B_PNG}, [PNG, B_PNG]),
    Row("a hash", {"image": b64(PNG), "file_hash": "ab" * 32, "content_id": "A" * 900}, [PNG]),
    Row("error that is none", {"image": b64(PNG), "error": "None"}, [PNG]),
    # types
    Row("png bare", b64(PNG), [PNG]),
    Row("png data URL", data_url(PNG), [PNG]),
    Row("jpeg", {"image": b64(JPEG)}, [JPEG]),
    Row("jpeg called png", {"image": data_url(JPEG, "image/png")}, [JPEG]),
    Row("webp", {"image": data_url(WEBP, "image/webp")}, [WEBP]),
    Row("gif", {"image": b64(GIF)}, [GIF]),
    Row("avif", {"image": b64(AVIF)}, [AVIF]),
    Row("mp4 base64", {"video": b64(MP4)}, [MP4]),
    Row("mp4 data URL", {"video": data_url(MP4, "video/mp4")}, [MP4]),
    Row("mp4 link", {"video": A_MP4}, [A_MP4]),
    Row("mp4 video_b64", {"video_b64": b64(MP4)}, [MP4]),
    Row("mp4 video_base64", {"video_base64": b64(MP4)}, [MP4]),
    Row("webm", {"videos": [b64(WEBM)]}, [WEBM]),
    Row("webm link", {"videos": [{"url": A_WEBM}]}, [A_WEBM]),
    Row("video with its poster", {"video_url": A_MP4, "image": b64(PNG)}, [A_MP4, PNG]),
    Row("audio", {"audio": data_url(MP3, "audio/mpeg")}, [MP3]),
    Row("mochi", {"result": A_MP4, "status": "DONE"}, [A_MP4]),
    Row("mochi failure", {"result": "FAILED: CUDA out of memory"}, error="worker_failed"),
    Row("generator", [{"progress": 50}, {"progress": 100}, {"images": [b64(PNG)]}], [PNG]),
    # base64 as it may come
    Row("base64 in lines", {"image": "\n".join(b64(PNG)[i : i + 76] for i in range(0, 999, 76))}, [PNG]),
    Row("base64 without padding", {"image": b64(PNG).rstrip("=")}, [PNG]),
    Row("base64 with too much padding", {"image": b64(PNG) + "==="}, [PNG]),
    Row("base64 for URLs", {"image": base64.urlsafe_b64encode(JPEG).decode()}, [JPEG]),
    Row("data URL without type", {"image": "data:;base64," + b64(PNG)}, [PNG]),
    Row("data URL with parameters", {"image": "data:image/png;name=a.png;base64," + b64(PNG)}, [PNG]),
    Row("bad base64", {"images": [{"type": "base64", "data": b64(PNG)[:80] + "!!" + b64(PNG)[80:]}]},
        error="base64_invalid"),
    Row("bad data URL", {"image": "data:image/png;base64,###"}, error="base64_invalid"),
    Row("one good, one bad", {"images": [b64(PNG), b64(PNG_2)[:80] + "*"]}, [PNG], ["base64_invalid"]),
    Row("two that are bad", {"images": [b64(PNG), b64(PNG)[:80] + "*", b64(PNG)[:60] + "*"]}, [PNG],
        ["base64_invalid"]),
    Row("the same twice", {"images": [b64(PNG), b64(PNG), b64(PNG_2)]}, [PNG, PNG_2]),
    # the worker's input, told back
    Row("input", {"input": {"image": b64(PNG)}}, error="no_output"),
    Row("parameters", {"parameters": {"image": b64(PNG), "url": A_PNG}}, error="no_output"),
    Row("input beside the result", {"input": {"image": b64(PNG_2)}, "image": b64(PNG)}, [PNG]),
    Row("input_image and init_images", {"input_image": b64(PNG_2), "init_images": [b64(PNG_3)]}, error="no_output"),
    Row("mask and preview beside the result", {"mask_image": b64(PNG_2), "preview": A_PNG, "image": b64(PNG)}, [PNG]),
    Row("names with input in them", {"image_input": b64(PNG_2), "image_prompt": A_PNG, "inputImage": b64(PNG_3),
        "job_input": {"image": b64(PNG_2)}, "image": b64(PNG)}, [PNG]),
    Row("names of what it was made from", {"start_image": A_PNG, "face_image": b64(PNG_2), "original": A_PNG,
        "source_image": A_PNG, "reference": b64(PNG_3), "control": b64(PNG_3), "image": b64(PNG)}, [PNG]),
    Row("an output called after its request", {"workflow_outputs": [b64(PNG)], "prompt_results": [b64(PNG_2)]},
        [PNG, PNG_2]),
    Row("previews beside a name nobody knows", {"zxcv": b64(PNG), "preview": {"abc": b64(PNG_2)}}, [PNG]),
    Row("an input in camel case", {"status": "ok", "inputImage": b64(PNG)}, error="no_output"),
    Row("only a preview", {"preview": b64(PNG)}, [PNG]),
    Row("a thumbnail of what stayed behind", {"video_path": "/tmp/a.mp4", "thumbnail": b64(PNG)}, error="local_path"),
    Row("the original of what stayed behind", {"source_image": b64(PNG), "image_path": "/tmp/out.png"},
        error="local_path"),
    Row("an error, and what it was given", {"error": "CUDA OOM", "original_image": b64(PNG)}, error="worker_failed"),
    Row("an error, and its arguments", {"errors": ["bad"], "args": {"image": b64(PNG)}}, error="worker_failed"),
    Row("an error, and an unnamed picture", {"status": "error", "message": "OOM", "zxcv": b64(PNG)},
        error="worker_failed"),
    # failures inside COMPLETED
    Row("esrgan", {"errors": ["Unexpected input. jobId is not a valid input option."]}, error="worker_failed"),
    Row("error text", {"error": "CUDA out of memory"}, error="worker_failed"),
    Row("error object", {"error": {"type": "ValueError", "message": "no"}}, error="worker_failed"),
    Row("success false", {"success": False, "message": "model is loading"}, error="worker_failed"),
    Row("error in a bare text", "Error: CUDA out of memory", error="worker_failed"),
    Row("failed in small letters", {"result": "failed: no memory"}, error="worker_failed"),
    Row("state and reason", {"state": "error", "reason": "nsfw"}, error="worker_failed"),
    Row("error true", {"error": True, "message": "OOM"}, error="worker_failed"),
    Row("an error after something else", [{"image": b64(PNG)[:80] + "*"}, {"error": "boom"}], error="worker_failed"),
    Row("an error beside a result further in", {"errors": ["x"], "response": {"images": [b64(PNG)]}}, [PNG],
        ["worker_failed"]),
    Row("not ok", {"ok": False, "detail": "no"}, error="worker_failed"),
    Row("success in a text", {"success": "false"}, error="worker_failed"),
    Row("cancelled", {"status": "cancelled"}, error="worker_failed"),
    Row("failed without a reason", {"status": "FAILED"}, error="worker_failed"),
    Row("failed, with image", {"status": "failed", "message": "step 2", "image": b64(PNG)}, [PNG], ["worker_failed"]),
    # what is no file
    Row("text under image", {"image": "a cat on the moon"}, error="no_output"),
    Row("text under data", {"data": "aGVsbG8=", "result": "done"}, error="no_output"),
    Row("text under message", {"message": "Image generated successfully"}, error="no_output"),
    Row("number under image", {"image": 7, "images": None}, error="no_output"),
    Row("link to a manual", {"status": "ok", "docs": "https://docs.example/help"}, error="no_output"),
    Row("base64 of HTML", {"image": b64(HTML)}, error="unknown_type"),
    Row("base64 of a small ZIP", {"image": b64(b"PK\x03\x04" + bytes(800))}, error="unknown_type"),
    Row("a slash and letters", {"image": "/" + "wrA" * 100}, error="no_output"),
    Row("letters and spaces", {"content": "abc123 " * 2_000}, error="no_output"),
    Row("a model's file", {"images": [], "model": "/models/flux.safetensors", "note": "ratio:/2"}, error="no_output"),
    Row("data URL of HTML", {"image": data_url(HTML, "text/html")}, error="unknown_type"),
    Row("data URL of SVG", {"image": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")},
        error="unknown_type"),
    Row("link to HTML", {"image_url": A_PAGE}, error="unknown_type"),
    Row("link to HTML beside an image", {"images": [A_PNG, A_PAGE]}, [A_PNG], ["unknown_type"]),
    Row("path on the worker's disk", {"image_path": "/tmp/out.png"}, error="local_path"),
    Row("broken rp_upload", {"images": ["simulated_uploaded/ab12.png"]}, error="local_path"),
    Row("local_upload", {"image_url": "local_upload/ab12"}, error="local_path"),
    Row("video_path", {"video_path": "output/clip.mp4"}, error="local_path"),
    Row("file address", {"image_url": "file:///etc/passwd"}, error="link_scheme"),
    Row("ftp address", {"image_url": "ftp://results.example/a.png"}, error="link_scheme"),
    Row("s3 address", {"images": [{"type": "s3_url", "data": "s3://bucket/a.png"}]}, error="link_scheme"),
    Row("link into the worker alone", [{"url": "http://127.0.0.1:8888/files/a.png"}], error="link_loopback"),
    Row("nothing", None, error="no_output"),
    Row("empty object", {}, error="no_output"),
    Row("empty list", [], error="no_output"),
    Row("empty text", "", error="no_output"),
    Row("a word", "done", error="no_output"),
    Row("a number", 7, error="no_output"),
    Row("true", True, error="no_output"),
]  # fmt: skip
