"""The gallery page: its files, and what a browser is told to let them do. All it knows it asks of the public API."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

FOLDER = Path(__file__).with_name("ui")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
INDEX = "index.html"

# What a browser is told of each of the files.
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

# As the files stand in their folder, any static host can serve them; the service has the others under ui/.
BESIDE = '"./'
API = 'data-api=""'


def text(name: str) -> str | None:
    """Of one of the files; None where there is no such one. The page itself is index()."""
    names = {path.name for path in FOLDER.iterdir()} - {INDEX}
    return (FOLDER / name).read_text(encoding="utf-8") if name in names else None


def index(path: str) -> str:
    """
    The page as it is asked for at `path`, which with API Gateway begins with the stage.

    Every address in it is relative. Only at the stage itself without a slash, where relative ones lead out of the
    stage, they begin with it.
    """
    root = "" if path.endswith("/") else f"{path}/"
    as_file = (FOLDER / INDEX).read_text(encoding="utf-8")
    return as_file.replace(BESIDE, f'"{root}ui/').replace(API, f'data-api="{root or "./"}"')


def content_type(name: str) -> str:
    """Of one of the files."""
    return f"{TYPES[Path(name).suffix]}; charset=utf-8"


def policy(clouds: Iterable[str]) -> str:
    """What a browser lets the page do: scripts are its own alone, pictures those of R2, found under these URLs."""
    hosts = sorted({f"{parts.scheme}://{parts.netloc}" for parts in map(urlsplit, clouds) if parts.netloc})
    sources = {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "connect-src": ["'self'", *hosts],
        "img-src": ["'self'", "data:", "blob:", *hosts],
        "media-src": hosts or ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }
    return "; ".join(" ".join([name, *allowed]) for name, allowed in sources.items())
