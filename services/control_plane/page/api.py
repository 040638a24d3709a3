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
# The page may load code, styles and data from this service only. Code and styles within its HTML are not run.
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "vary": "accept-encoding",
}


@router.get("/")
async def page(request: Request) -> Response:
    """Answers with the HTML of the web page. Browsers ask for this HTML at each visit, because it names the newest
    scripts and styles.
    """
    if not (BUILT / "index.html").is_file():
        return PlainTextResponse(NOT_BUILT, 404)
    return _file(request, BUILT / "index.html", "no-cache")


@router.get("/assets/{name}")
async def asset(request: Request, name: str) -> Response:
    """Answers with a script, a style or another file of the web page. Browsers keep the file for a year, because its
    name changes with its content.
    """
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
    """Returns the bytes of the file, compressed with gzip. The result is cached until the file changes.

    `modified` is the time of the file's last change. It is an argument so that a changed file is not found in the
    cache.
    """
    return gzip.compress(path.read_bytes())
