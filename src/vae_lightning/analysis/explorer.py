"""Serve a web page to explore latent space with the mouse: drag, hover, draw. The page is explorer.html.

The page has coordinates u `[latent_dim]`, and z = center + Σ uᵢ axesᵢ. The axes are the latent dimensions, most active
first, or the principal directions of the codes of the test set, each with a length of one standard deviation. The map
shows two axes, sliders the others. The page computes z, and the server decodes it.
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

from vae_lightning.analysis.generation import latent_center_and_deviation
from vae_lightning.config import ConfigError, UserError
from vae_lightning.data.pixels import described
from vae_lightning.figures import CLASS_COLOURS, displayable
from vae_lightning.models.latents import by_activity, principal_directions
from vae_lightning.runs.directory import StrPath
from vae_lightning.runs.loading import Run, open_run

if TYPE_CHECKING:
    from aiohttp import web

LOCAL_HOSTS = {"127.0.0.1", "localhost", "::1"}
ALL_INTERFACES = {"0.0.0.0", "::"}  # requests may then use any name of this machine
MAP_IMAGES = 3_000  # test images on the map


def explore_run(
    run: StrPath,
    *,
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1",
    port: Annotated[int, Field(ge=1, le=65535)] = 8000,
    data_root: str | None = None,
) -> None:
    """Serve a web page that shows the latent space of a trained run: drag, hover, draw a digit.

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
    """Return the application: the page, /state, /decode, /image/{index} and /encode.

    It refuses requests for another host's name, or from a page of another origin.
    """
    from aiohttp import web

    model, images, labels = run.model, run.data.test_images, run.data.test_labels
    codes = model.all_codes(images, labels)
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
        return web.json_response(describe(run, codes))

    @routes.post("/decode")
    async def decode(request: web.Request) -> web.Response:
        z = await numbers(request, "z", model.latent_dim)
        y = (await request.json()).get("y")  # the chosen class of a conditional model
        return web.Response(body=as_bytes(model.decode_images(z, y)), content_type="application/octet-stream")

    @routes.get(r"/image/{index:\d+}")
    async def image(request: web.Request) -> web.Response:
        index = int(request.match_info["index"])
        if index >= len(images):
            raise UserError(f"{index}: should be an index from 0 to {len(images) - 1}, of a test image")
        x = model.images(images[index])
        reconstruction = model.reconstruct(x, labels[index : index + 1].to(model.device))
        return web.json_response({"image": as_base64(x[0]), "reconstruction": as_base64(reconstruction[0])})

    @routes.post("/encode")
    async def encode(request: web.Request) -> web.Response:
        drawn = await numbers(request, "image", math.prod(model.image_shape))
        x = model.images(normalize_drawing(drawn.reshape(model.image_shape).clamp(0, 1)))
        y = (await request.json()).get("y")
        z = model.codes(x, y)[0]
        nearest = (codes - z).square().sum(dim=1).topk(5, largest=False).indices.tolist()
        return web.json_response(
            {
                "z": z.tolist(),
                "seen": as_base64(x[0]),
                "reconstruction": as_base64(model.decode_images(z, y)),
                "nearest": [{"image": as_base64(images[i]), "label": int(labels[i])} for i in nearest],
            }
        )

    application = web.Application(middlewares=[check_request])
    application.add_routes(routes)
    return application


async def numbers(request: web.Request, name: str, n: int) -> Tensor:
    """Return the n numbers `[n]` under `name` in a request's JSON. Raises UserError for another number of them."""
    given = (await request.json())[name]
    if len(given) != n:
        raise UserError(f"{name}: should be a list of {n} numbers")
    return torch.tensor(given, dtype=torch.float32)


def describe(run: Run, codes: Tensor) -> dict[str, Any]:
    """Return the state of the page: a title, two sets of axes, and the codes and labels of test images."""
    center, deviation = latent_center_and_deviation(run)
    directions, deviations = principal_directions(codes)
    two_dimensional = codes.shape[1] == 2
    n_classes = max(run.model.classes, int(run.data.test_labels.max()) + 1)
    order = [0, 1] if two_dimensional else by_activity(codes)
    bases = {
        "dimensions": {
            "center": center.tolist(),
            "axes": torch.diag(deviation)[order].tolist(),
            "names": [f"z{dimension + 1}" for dimension in order],
        },
        "principal": {
            "center": codes.mean(dim=0).tolist(),
            "axes": (directions * deviations.clamp_min(1e-6)[:, None]).tolist(),
            "names": [f"direction {i + 1}" for i in range(len(directions))],
        },
    }
    if two_dimensional:  # the map shows the complete latent space
        del bases["principal"]
    return {
        "title": f"{run.directory.path.name}: {type(run.model).__name__}, latent_dim {run.model.latent_dim}, "
        f"{run.data.dataset}, {described(run.data.pixels, run.data.image_shape[0])} pixels",
        "shape": list(run.model.image_shape),
        "shown": list(displayable(torch.zeros(1, *run.model.image_shape)).shape[1:]),
        "classes": run.model.classes,  # to choose from; 0 if the model is not conditional
        "bases": bases,
        "codes": [[round(value, 4) for value in code] for code in codes[:MAP_IMAGES].tolist()],
        "labels": run.data.test_labels[:MAP_IMAGES].tolist(),
        "names": [run.data.class_name(label) for label in range(n_classes)],
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


def as_bytes(image: Tensor) -> bytes:
    """Return an image `[channels, height, width]`, bytes or floats in [0, 1], as shown: one byte per value, by rows."""
    image = displayable(image.unsqueeze(0))[0]
    if image.dtype != torch.uint8:
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()


def as_base64(image: Tensor) -> str:
    return base64.b64encode(as_bytes(image)).decode()
