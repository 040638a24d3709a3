"""The routes of the web page: `/`, and the scripts and styles that it loads from `/assets`.

They need no key, because these files hold no data: the page asks the API below /v1 with the key of its reader.
"""

import gzip
import mimetypes
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse

router = APIRouter(include_in_schema=False)

BUILT = Path(__file__).with_name("built")
NOT_BUILT = "The web page is not built; run `make page` in the folder of the sources, then load this address again.\n"
# The page takes code, styles and data from this service only, and none that stand in the page itself.
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "vary": "accept-encoding",
}


@router.get("/")
async def page(request: Request) -> Response:
    """Answers the page. A browser asks for it each time, because it names the newest assets."""
    if not (BUILT / "index.html").is_file():
        return PlainTextResponse(NOT_BUILT, 404)
    return _file(request, BUILT / "index.html", "no-cache")


@router.get("/assets/{name}")
async def asset(request: Request, name: str) -> Response:
    """Answers a file of the page. Its name holds a hash of its content, so a browser keeps it for a year."""
    if not (BUILT / "assets" / name).is_file():
        raise HTTPException(404, "Not Found")
    return _file(request, BUILT / "assets" / name, "public, max-age=31536000, immutable")


def _file(request: Request, path: Path, cached: str) -> Response:
    headers = HEADERS | {"cache-control": cached}
    kind = mimetypes.guess_type(path.name)[0]
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return Response(path.read_bytes(), headers=headers, media_type=kind)
    packed = _packed(path, path.stat().st_mtime_ns)
    return Response(packed, headers=headers | {"content-encoding": "gzip"}, media_type=kind)


@cache
def _packed(path: Path, modified: int) -> bytes:
    """Returns the file compressed. `modified` is its time of change, so that a new file is compressed anew."""
    return gzip.compress(path.read_bytes())
