"""Serve a web page to explore latent space: move, interpolate, paint or open an image. The page is explorer.html.

The page holds a point z `[latent_dim]` and moves it along the axes of axes.py. The map shows two of them, sliders show
all. The server decodes z, and computes where the test images are on the map.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from vae_lightning.analysis.axes import Axes, latent_axes, rounded
from vae_lightning.analysis.generation import codes_and_kl
from vae_lightning.config import ConfigError, UserError
from vae_lightning.data.pixels import described
from vae_lightning.figures import CLASS_COLOURS, displayable
from vae_lightning.models.inputs import as_tensor
from vae_lightning.runs.directory import StrPath
from vae_lightning.runs.loading import Run, open_run

if TYPE_CHECKING:
    from aiohttp import web

LOCAL_HOSTS = {"127.0.0.1", "localhost", "::1"}
ALL_INTERFACES = {"0.0.0.0", "::"}  # requests may then use any name of this machine
MAP_IMAGES = 3_000  # test images on the map
LARGEST_REQUEST = 2**26  # bytes; an image of 512×512 in colour takes 6 MB as text


def explore_run(
    run: StrPath,
    *,
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1",
    port: Annotated[int, Field(ge=1, le=65535)] = 8000,
    data_root: str | None = None,
) -> None:
    """Serve a web page that shows the latent space of a trained run: move, interpolate, paint or open an image.

        pip install -e '.[explore]'
        vae explore outputs/…                # then open http://127.0.0.1:8000

    Args:
        run: run directory, one of its checkpoints, or latest
        host: 127.0.0.1 is reachable from this machine only, 0.0.0.0 from every machine in the network
        port: port of the page
        data_root: directory of the data on this machine, if it differs from the run's

    Raises:
        UserError: if the run cannot be opened, or the port is in use
    """
    try:
        from aiohttp import web
    except ImportError:
        raise ConfigError("explore needs aiohttp: pip install -e '.[explore]'") from None
    application = make_application(open_run(run, "cpu", data_root), host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        web.run_app(
            application,
            host=host,
            port=port,
            access_log=None,
            print=lambda *_: print(f"{address}    (stop with Ctrl-C)", flush=True),
        )
    except OSError as error:
        raise UserError(f"host={host} port={port}: cannot listen there ({error.strerror}); try another port") from None


@torch.inference_mode()
def make_application(run: Run, host: str) -> web.Application:
    """Return the application: the page, /state, /points/{axes}/{across}/{up}, /decode, /image/{index} and /encode.

    It refuses requests for another host's name, or from a page of another origin.
    """
    from aiohttp import web

    model, images, labels = run.model, run.data.test_images, run.data.test_labels
    codes, kl = codes_and_kl(run)
    axes = latent_axes(run, codes, kl)
    routes = web.RouteTableDef()

    @web.middleware
    async def check_request(request: web.Request, handler: Any) -> web.StreamResponse:
        # A page of another origin must not read answers, by resolving its own name to this machine (DNS rebinding),
        # nor send requests.
        name = urlsplit(f"//{request.host}").hostname
        if host not in ALL_INTERFACES and name not in {host.lower(), *LOCAL_HOSTS}:
            raise web.HTTPForbidden(text=f"{request.host}: not a name of this server")
        if request.headers.get("Origin", f"//{request.host}").partition("//")[2] != request.host:
            raise web.HTTPForbidden(text="requests from pages of another origin are refused")
        try:
            with torch.inference_mode():
                response: web.StreamResponse = await handler(request)
                return response
        except UserError as error:
            raise web.HTTPBadRequest(text=str(error)) from None

    @routes.get("/")
    async def page(request: web.Request) -> web.Response:
        html = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
        return web.Response(text=html, content_type="text/html")

    @routes.get("/state")
    async def state(request: web.Request) -> web.Response:
        return web.json_response(describe(run, axes))

    @routes.get(r"/points/{axes}/{across:\d{1,9}}/{up:\d{1,9}}")
    async def points(request: web.Request) -> web.Response:
        found = axes.get(request.match_info["axes"])
        plane = [int(request.match_info[name]) for name in ("across", "up")]
        if found is None or max(plane) >= len(found.names):
            raise UserError(f"{request.path}: should be one of {', '.join(axes)}, and the numbers of two of its axes")
        return web.json_response(rounded(found.coordinates(codes[:MAP_IMAGES], plane)))

    @routes.post("/decode")
    async def decode(request: web.Request) -> web.Response:
        given = await read_json(request, "z")  # with the chosen class y of a conditional model
        decoded = model.decode_images(given["z"], given.get("y")).reshape(-1, *model.image_shape)
        return web.Response(body=as_bytes(decoded), content_type="application/octet-stream")

    @routes.get(r"/image/{index:\d{1,9}}")
    async def image(request: web.Request) -> web.Response:
        index = int(request.match_info["index"])
        if index >= len(images):
            raise UserError(f"{index}: should be an index from 0 to {len(images) - 1}, of a test image")
        reconstruction = model.decode_images(codes[index], labels[index])
        shown = {"image": as_base64(images[index]), "reconstruction": as_base64(reconstruction)}
        return web.json_response(shown | {"z": rounded(codes[index])})

    @routes.post("/encode")
    async def encode(request: web.Request) -> web.Response:
        given = await read_json(request, "image")
        x, y = as_tensor(given["image"], "image").float(), given.get("y")
        if x.numel() != (n := math.prod(model.image_shape)):
            raise UserError(f"image: should be a list of {n} numbers")
        x = x.reshape(model.image_shape).clamp(0, 1)
        x = model.images(normalize_drawing(x) if given.get("normalize") else x)
        z = model.codes(x, y)[0]
        nearest = (codes - z).square().sum(dim=1).topk(min(5, len(codes)), largest=False).indices.tolist()
        return web.json_response(
            {
                "z": rounded(z),
                "seen": as_base64(x[0]),
                "reconstruction": as_base64(model.decode_images(z, y)),
                "nearest": [{"image": as_base64(images[i]), "label": int(labels[i])} for i in nearest],
            }
        )

    application = web.Application(middlewares=[check_request], client_max_size=LARGEST_REQUEST)
    application.add_routes(routes)
    return application


async def read_json(request: web.Request, name: str) -> dict[str, Any]:
    """Return a request's JSON, an object with a list under `name`. Raises UserError for anything else."""
    try:
        given = await request.json()
        if isinstance(given[name], list):
            return given
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{request.path}: should be JSON, an object with a list as {name}")


def describe(run: Run, axes: dict[str, Axes]) -> dict[str, Any]:
    """Return the state of the page: the run, its images and classes, the axes, and the labels of test images."""
    model, data = run.model, run.data
    n_classes = max(model.classes, int(data.test_labels.max()) + 1)
    pixels = described(data.pixels, data.image_shape[0])
    return {
        "name": run.directory.path.name,
        "about": f"{type(model).__name__}, latent_dim {model.latent_dim}, {data.dataset}, {pixels} pixels",
        "shape": list(model.image_shape),
        "shown": list(displayable(torch.zeros(1, *model.image_shape)).shape[1:]),
        "classes": model.classes,  # to choose from; 0 if the model is not conditional
        "axes": {name: found.described() for name, found in axes.items()},
        "labels": data.test_labels[:MAP_IMAGES].tolist(),
        "names": [data.class_name(label) for label in range(n_classes)],
        "colours": CLASS_COLOURS,
    }


def normalize_drawing(drawing: Tensor) -> Tensor:
    """Scale and center a drawing `[channels, height, width]` in [0, 1] as MNIST's digits are; the same shape.

    The longer side becomes 20 of 28 pixels, and the center of mass moves to pixel (14, 14) (LeCun et al. 1998).
    A blank drawing stays blank.
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


def as_bytes(images: Tensor) -> bytes:
    """Return images `[n, channels, height, width]`, bytes or floats in [0, 1], as shown: a byte per value, by rows."""
    images = displayable(images)
    if images.dtype != torch.uint8:
        images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes()


def as_base64(image: Tensor) -> str:
    """Return an image `[channels, height, width]` as shown."""
    return base64.b64encode(as_bytes(image.unsqueeze(0))).decode()
