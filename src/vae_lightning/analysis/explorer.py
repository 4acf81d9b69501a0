"""A page on this machine to walk through latent space with the mouse: drag, hover, draw. explorer.html is the page.

The page has one set of coordinates u `[latent_dim]`: z = center + Σ uᵢ axesᵢ, where the axes are the latent dimensions,
most active first, or the principal directions of the test set's codes, each a standard deviation long. The map shows
two of them, sliders the rest; the page computes z, and the server decodes it.

Needs the extra: pip install -e '.[explore]'.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from vae_lightning.analysis.generation import latent_center_and_deviation
from vae_lightning.config import ConfigError, UserError
from vae_lightning.data.pixels import described
from vae_lightning.figures import DIGIT_COLOURS
from vae_lightning.models.latents import by_activity, principal_directions
from vae_lightning.runs.loading import Run, open_run

if TYPE_CHECKING:
    from aiohttp import web

LOCAL = {"127.0.0.1", "localhost", "::1"}
EVERYWHERE = {"0.0.0.0", "::"}  # hosts that mean every address of this machine: it may go by any name then
SHOWN = 3_000  # test images on the map


def explore_run(
    run: str,
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1",
    port: Annotated[int, Field(ge=1, le=65535)] = 8000,
    data_root: str | None = None,
    trust: Sequence[str] = (),
) -> None:
    """Serve the page until interrupted. Raises UserError for a run that cannot be opened or a port that is taken."""
    try:
        from aiohttp import web
    except ImportError:
        raise ConfigError("explore needs aiohttp: pip install -e '.[explore]'") from None
    application = make_application(open_run(run, "cpu", trust, data_root), host)
    try:
        web.run_app(
            application,
            host=host,
            port=port,
            access_log=None,
            print=lambda *_: print(f"http://{url_host(host)}:{port}    (Ctrl-C stops it)", flush=True),
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such host"
        raise UserError(f"host={host} port={port}: cannot be served there ({reason}); try another port") from None


@torch.inference_mode()
def make_application(run: Run, host: str) -> web.Application:
    """The page and what it asks for: /state, /decode, /image/{index}, /encode. Answers only to its own host's name."""
    from aiohttp import web

    model, images, labels = run.model, run.data.test_images, run.data.test_labels
    codes = model.all_codes(images, labels)

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        # A page from elsewhere must not read along, by resolving its own name to this machine (DNS rebinding), nor set
        # this one to work.
        if host not in EVERYWHERE and name_in(f"//{request.host}") not in {host.lower(), *LOCAL}:
            raise web.HTTPForbidden(text=f"{request.host}: not a name of this server")
        if "Origin" in request.headers and request.headers["Origin"].partition("//")[2] != request.host:
            raise web.HTTPForbidden(text="a page from elsewhere has no business here")
        try:
            with torch.inference_mode():
                response: web.StreamResponse = await handler(request)
        except UserError as error:
            raise web.HTTPBadRequest(text=" ".join(str(error).split())) from None
        response.headers["Content-Security-Policy"] = "default-src 'self' 'unsafe-inline' data:"
        return response

    async def page(request: web.Request) -> web.Response:
        return web.Response(
            text=files("vae_lightning.analysis").joinpath("explorer.html").read_text(encoding="utf-8"),
            content_type="text/html",
        )

    async def state(request: web.Request) -> web.Response:
        return web.json_response(describe(run, codes))

    async def decode(request: web.Request) -> web.Response:
        z = await numbers(request, "z", model.latent_dim)
        return web.Response(body=as_bytes(model.pictures(z)), content_type="application/octet-stream")

    async def image(request: web.Request) -> web.Response:
        given = request.match_info["index"]
        index = int(given) if given.isdecimal() and len(given) < 10 else -1
        if not 0 <= index < len(images):
            raise ConfigError(f"{given[:20]}: the test set has {len(images)} images, numbered from 0")
        x = model.images(images[index])
        shown = model.reconstruct(x, labels[index : index + 1].to(model.device))
        return web.json_response({"image": as_base64(x[0]), "reconstruction": as_base64(shown[0])})

    async def encode(request: web.Request) -> web.Response:
        drawn = await numbers(request, "image", math.prod(model.image_shape))
        x = model.images(as_digit(drawn.reshape(model.image_shape).clamp(0, 1)))
        z = model.codes(x)[0]
        nearest = (codes - z).square().sum(dim=1).topk(5, largest=False).indices.tolist()
        return web.json_response(
            {
                "z": z.tolist(),
                "seen": as_base64(x[0]),
                "reconstruction": as_base64(model.pictures(z)),
                "nearest": [{"image": as_base64(images[i]), "label": int(labels[i])} for i in nearest],
            }
        )

    application = web.Application(middlewares=[guard], client_max_size=1_000_000)
    application.add_routes(
        [
            web.get("/", page),
            web.get("/state", state),
            web.post("/decode", decode),
            web.get("/image/{index}", image),
            web.post("/encode", encode),
        ]
    )
    return application


async def numbers(request: web.Request, name: str, n: int) -> Tensor:
    """The n finite numbers, `[n]`, that a request's JSON has under `name`. Raises UserError for anything else."""
    from aiohttp import web

    try:
        body = await request.read()
    except web.HTTPException:  # too large
        raise
    except Exception as error:  # compressed in a way that it is not, or cut short
        raise UserError(f"{name}: the request's body cannot be read") from error
    try:
        given = json.loads(body)[name]
        values = torch.tensor(given, dtype=torch.float32) if len(given) == n else torch.empty(0)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError, RecursionError):
        values = torch.empty(0)
    if values.shape != (n,) or not values.isfinite().all():
        raise UserError(f"{name}: should be a list of {n} numbers")
    return values


def name_in(url: str) -> str | None:
    """The host's name in a URL, without its port; None where there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def describe(run: Run, codes: Tensor) -> dict[str, Any]:
    """What the page needs to know at first: the model, two sets of axes, and the test images' codes and digits."""
    center, spread = latent_center_and_deviation(run, codes)
    order = by_activity(codes)
    directions, deviations = principal_directions(codes)
    bases = {
        "dimensions": {
            "center": center.tolist(),
            "axes": torch.diag(spread)[order].tolist(),
            "names": [f"z{dimension + 1}" for dimension in order],
        },
        "principal": {
            "center": codes.mean(dim=0).tolist(),
            "axes": (directions * deviations.clamp_min(1e-6)[:, None]).tolist(),
            "names": [f"direction {i + 1}" for i in range(len(directions))],
        },
    }
    if codes.shape[1] == 2:  # nothing to order, and nothing to turn
        bases = {"dimensions": {"center": center.tolist(), "axes": torch.diag(spread).tolist(), "names": ["z1", "z2"]}}
    return {
        "title": f"{run.directory.path.name}: {type(run.model).__name__}, latent_dim {run.model.latent_dim}, "
        f"{run.data.dataset}, {described(run.data.pixels, run.data.image_shape[0])} pixels",
        "shape": list(run.model.image_shape),
        "bases": bases,
        "codes": [[round(value, 4) for value in code] for code in codes[:SHOWN].tolist()],
        "labels": run.data.test_labels[:SHOWN].tolist(),
        "colours": DIGIT_COLOURS,
    }


def as_digit(drawing: Tensor) -> Tensor:
    """A drawing `[channels, height, width]` in [0, 1], sized and placed as MNIST's digits are: the same shape.

    They fill a box of 20 of the 28 pixels on their longer side, with their centre of mass on pixel (14, 14) (LeCun
    et al. 1998). A blank drawing stays blank.
    """
    ink = (drawing.sum(dim=0) > 0.01).nonzero()
    if not len(ink):
        return drawing
    (top, left), (bottom, right) = ink.amin(dim=0).tolist(), ink.amax(dim=0).tolist()
    crop = drawing[:, top : bottom + 1, left : right + 1].unsqueeze(0)
    height, width = drawing.shape[1:]
    scale = 20 / 28 * min(height, width) / max(crop.shape[2:])
    size = [max(1, round(side * scale)) for side in crop.shape[2:]]
    small = interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
    mass = small.sum(dim=0)
    row = (mass.sum(dim=1) * torch.arange(size[0])).sum() / mass.sum()
    column = (mass.sum(dim=0) * torch.arange(size[1])).sum() / mass.sum()
    y = min(max(round(height / 2 - row.item()), 0), height - size[0])
    x = min(max(round(width / 2 - column.item()), 0), width - size[1])
    placed = torch.zeros_like(drawing)
    placed[:, y : y + size[0], x : x + size[1]] = small
    return placed


def as_bytes(image: Tensor) -> bytes:
    """An image `[channels, height, width]`, bytes or floats in [0, 1], as one byte a value, row by row."""
    if image.dtype != torch.uint8:
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return bytes(image.permute(1, 2, 0).contiguous().cpu().numpy().tobytes())


def as_base64(image: Tensor) -> str:
    return base64.b64encode(as_bytes(image)).decode()
