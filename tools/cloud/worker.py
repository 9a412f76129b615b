"""
The workers: they draw the prompt of an input, or of the ComfyUI workflow in it.

The prompt of a workflow is the first text under `prompt` or `text` in a node. Where a node has an `image_url`, they
fetch that picture and draw over it, so that one sees what was edited.
"""

import base64
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

import requests

from tools.cloud.render import draw, draw_over
from tools.cloud.runs import Run

FETCH_SECONDS = 5.0
MOST_BYTES = 20 * 1024 * 1024
PIECE_BYTES = 65_536
PICTURES_KEPT = 64

# Loads a picture: URL; its bytes. Raises OSError; its words are told to all, so the query of the URL is not in them.
Fetch = Callable[[str], bytes]


class NotLoaded(Exception):
    """The picture that a run was to edit could not be had."""


class Worker:
    """All workers of an account; `fetch` loads the pictures that they edit."""

    def __init__(self, *, results_url: str, fetch: Fetch) -> None:
        self.fetch = fetch
        self._results_url = results_url
        self._lock = threading.Lock()
        self._pictures: OrderedDict[str, Future[bytes]] = OrderedDict()

    def output(self, run: Run) -> Any:
        """What a worker returns for the run, None: nothing. Raises NotLoaded."""
        if "output" in run.wish:
            return run.wish["output"]
        shape = run.wish.get("shape", "base64")
        if shape == "none":
            return None
        picture = self.picture(run)
        if shape == "link":
            return {"image_url": f"{self._results_url}/{run.id}.png", "cost": 0.02}
        data = base64.b64encode(picture).decode()
        if shape == "data_url":
            return {"images": [f"data:image/png;base64,{data}"], "seed": 42}
        return {"images": [{"filename": "ComfyUI_00001_.png", "type": "base64", "data": data}]}

    def picture(self, run: Run) -> bytes:
        """The PNG of the run; what it edits is fetched once, while others who ask wait. Raises NotLoaded."""
        prompt = _text(run.input, "prompt", "text") or str(run.input.get("prompt", ""))
        url = _text(run.input, "image_url")
        if url is None:
            return _filled(draw(prompt), run.wish.get("bytes", 0))
        picture, is_new = self._kept(run.id)
        if is_new:
            try:
                picture.set_result(self._edited(prompt, url))
            except BaseException as error:  # whatever it is, the others must not wait for ever
                picture.set_exception(error)
        return picture.result()

    def _kept(self, run_id: str) -> tuple[Future[bytes], bool]:
        """The run's picture, which may still be under way, and whether it is for the caller to make it."""
        with self._lock:
            is_new = run_id not in self._pictures
            picture = self._pictures.setdefault(run_id, Future())
            self._pictures.move_to_end(run_id)
            if len(self._pictures) > PICTURES_KEPT:
                self._pictures.popitem(last=False)
        return picture, is_new

    def _edited(self, prompt: str, url: str) -> bytes:
        try:
            return draw_over(prompt, self.fetch(url))
        except (OSError, ValueError) as error:
            raise NotLoaded(f"image could not be loaded: {url.partition('?')[0]}: {error}") from error


def fetch(url: str) -> bytes:
    """Load a picture of at most 20 MB within 5 s, by no proxy. Raises OSError, whose words hold nothing of the URL."""
    end = time.monotonic() + FETCH_SECONDS
    try:
        with requests.Session() as session:
            session.trust_env = False
            with session.get(url, timeout=FETCH_SECONDS, stream=True) as answer:
                if answer.status_code != 200:
                    raise OSError(f"HTTP {answer.status_code}")
                return _body(answer, end)
    except (requests.RequestException, ValueError) as error:
        # Their own words hold the whole URL.
        raise OSError(f"no answer ({type(error).__name__})") from None


def _body(answer: requests.Response, end: float) -> bytes:
    content = bytearray()
    for piece in answer.iter_content(PIECE_BYTES):
        content += piece
        if len(content) > MOST_BYTES:
            raise OSError("it has more than 20 MB")
        if time.monotonic() > end:
            raise OSError("it takes more than 5 s")
    return bytes(content)


@lru_cache(maxsize=4)
def _filled(picture: bytes, size: int) -> bytes:
    """The picture with as much behind its end, where every decoder stops, that it has so many bytes."""
    return picture.ljust(size, b"\0")


def _text(given: dict[str, Any], *names: str) -> str | None:
    """The first text that a node of the workflow has under one of the names."""
    workflow = given.get("workflow")
    nodes = workflow.values() if isinstance(workflow, dict) else ()
    inputs = [node.get("inputs") for node in nodes if isinstance(node, dict)]
    values = [entry.get(name) for entry in inputs if isinstance(entry, dict) for name in names]
    return next((value for value in values if isinstance(value, str) and value.strip()), None)
