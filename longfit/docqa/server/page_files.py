"""The page at `/`: a few files of the package."""

from importlib.resources import files

from fastapi import APIRouter, Response

from longfit.docqa.server.errors import ApiError

router = APIRouter()
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
NAMES = ("page.html", "page.css", "page.js", "kept.css", "kept.js", "icon.svg")


def page_file(name: str) -> str:
    """The text of one of `NAMES`."""
    return (files("longfit.docqa") / "page" / name).read_text(encoding="utf-8")


@router.get("/", include_in_schema=False)
def page() -> Response:
    """The page itself."""
    return _sent("page.html")


@router.get("/page/{name}", include_in_schema=False)
def part(name: str) -> Response:
    """What the page is made of."""
    if name not in NAMES:
        raise ApiError(404, "there is no such file", "not_found")
    return _sent(name)


def _sent(name: str) -> Response:
    kind = TYPES[name.rpartition(".")[2]]
    return Response(page_file(name), media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"})
