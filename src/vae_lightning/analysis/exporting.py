"""Encoder and decoder for use without this package: as ONNX graphs and as safetensors, each held against PyTorch.

Needs the extra: pip install -e '.[export]'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae_lightning.config import UserError
from vae_lightning.files import staging_directory
from vae_lightning.models.base import ImageModel
from vae_lightning.models.posteriors import DiagonalGaussian
from vae_lightning.models.vae import VAE
from vae_lightning.runs.loading import open_run

TOLERANCE = 1e-4  # between the graphs and PyTorch, absolute and relative: float32, kernels of another make


class ExportError(UserError):
    """An export that is not possible, or does not compute what the model does."""


class Encoder(nn.Module):
    """Images `[batch, *image_shape]` in [0, 1] → codes `[batch, latent_dim]`; of a VAE, mean and log variance."""

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, VAE) and isinstance(q := self.model.encode(images), DiagonalGaussian):
            return q.mean, q.log_variance
        return (self.model.codes(images),)


class Decoder(nn.Module):
    """Latents `[batch, latent_dim]` → images `[batch, *image_shape]` in [0, 1]: of a VAE, the mean of p(x|z)."""

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.pictures(latents)


def export_run(run: str | Path, trust: Sequence[str] = (), data_root: str | None = None) -> Path:
    """Write encoder and decoder of a run into its `export/`, as .onnx and .safetensors, and return that directory.

    The ONNX graphs take any batch size, images `[batch, *image_shape]` in [0, 1] and latents `[batch, latent_dim]`. The
    safetensors hold the networks' weights under their PyTorch names, and in their metadata the configuration.
    Raises ExportError where the extra is not installed, or what was written does not compute what the model does.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
        import safetensors.torch
    except ImportError as error:
        raise ExportError(f"export needs {error.name}: pip install -e '.[export]'") from None
    opened = open_run(run, "cpu", trust, data_root)
    model, data = opened.model, opened.data
    directory = opened.directory.subdirectory(opened.directory.export)
    images = model.images(data.test_images[:7])
    latents = torch.randn(7, model.latent_dim, generator=torch.Generator().manual_seed(0))
    description = {
        "model": json.dumps(model.config["model"]),
        "pixels": data.pixels,
        "data": data.dataset,
    }
    gaussian = isinstance(model, VAE) and isinstance(model.encode(images), DiagonalGaussian)
    outputs: dict[str, list[str]] = {
        "encoder": ["mean", "log_variance"] if gaussian else ["codes"],
        "decoder": ["images"],
    }
    wrapped: dict[str, tuple[nn.Module, str, Tensor]] = {
        "encoder": (Encoder(model).eval(), "images", images),
        "decoder": (Decoder(model).eval(), "latents", latents),
    }
    with staging_directory(directory) as scratch:
        for name, (module, given, x) in wrapped.items():
            weights = {key: value.contiguous() for key, value in getattr(model, name).state_dict().items()}
            file = scratch / f"{name}.safetensors"
            file.write_bytes(safetensors.torch.save(weights, metadata=description))
            saved = safetensors.torch.load_file(file)
            if not all(torch.equal(saved[key], value) for key, value in weights.items()):
                raise ExportError(f"{file.name}: does not hold the weights that were written")

            graph = scratch / f"{name}.onnx"
            with torch.no_grad():
                try:
                    dynamic = ({0: torch.export.Dim("batch")},)
                    program = torch.onnx.export(
                        module, (x,), input_names=[given], dynamic_shapes=dynamic, external_data=False, verbose=False
                    )
                    assert program is not None
                    name_outputs(program.model.graph, outputs[name])
                    program.save(graph, external_data=False)
                except (torch.onnx.OnnxExporterError, RuntimeError) as error:
                    reason = " ".join(str(error).split())[:300]
                    raise ExportError(f"{graph.name}: this network cannot be written as ONNX ({reason})") from error
                session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
                for part in (x, x[:1]):
                    expected = module(part)
                    expected = expected if isinstance(expected, tuple) else (expected,)
                    _compare(graph, session.run(None, {given: part.numpy()}), expected)
    return directory


def name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Name the outputs of an ONNX graph; a node of the network's own, such as a mean, may have taken the name."""
    for node in graph:
        for value in node.outputs:
            value.name = f"node_{value.name}"
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def _compare(graph: Path, found: list[Any], expected: tuple[Tensor, ...]) -> None:
    for array, tensor in zip(found, expected, strict=True):
        if not torch.allclose(torch.from_numpy(array), tensor, rtol=TOLERANCE, atol=TOLERANCE):
            worst = (torch.from_numpy(array) - tensor).abs().max()
            raise ExportError(f"{graph.name}: differs from PyTorch by up to {worst:.1e}")
