"""Export encoder and decoder for use without this package: ONNX graphs, checked against PyTorch, and safetensors."""

from __future__ import annotations

import json
import re
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
from vae_lightning.runs.directory import StrPath
from vae_lightning.runs.loading import open_run

TOLERANCE = 1e-4  # absolute and relative, between float32 kernels of ONNX Runtime and PyTorch


class Encoder(nn.Module):
    """Map images `[batch, *image_shape]` in [0, 1] to codes `[batch, latent_dim]`.

    With a diagonal Gaussian posterior, to its mean and log variance. A conditional model takes labels `[batch]`, too.
    """

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        if isinstance(self.model, VAE):
            q = self.model.posterior_given(images, labels)
            return (q.mean, q.log_variance) if isinstance(q, DiagonalGaussian) else (q.mean,)
        return (self.model.codes_given(images, labels),)


class Decoder(nn.Module):
    """Map latents `[batch, latent_dim]` to images `[batch, *image_shape]` in [0, 1]; of a VAE, the mean of p(x|z).

    A conditional model takes labels `[batch]`, too.
    """

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model.decode_images_given(latents, labels)


def export_run(run: StrPath, *, data_root: str | None = None) -> Path:
    """Write encoder and decoder into the run's `export/`, as .onnx and .safetensors, and return that directory.

        pip install -e '.[export]'
        vae export outputs/…

    The ONNX graphs take any batch size, images `[batch, *image_shape]` in [0, 1] and latents `[batch, latent_dim]`.
    Those of a conditional model have a second input, labels `[batch]`, int64. The safetensors have the weights of the
    networks under their PyTorch names, and the configuration as metadata.

    Args:
        run: run directory, one of its checkpoints, or latest
        data_root: directory of the data on this machine, if it differs from the run's

    Raises:
        UserError: if the extra is not installed, or if the files differ from the model
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch's exporter needs it)
        import safetensors.torch
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install -e '.[export]'") from None
    opened = open_run(run, "cpu", data_root)
    model, data = opened.model, opened.data
    directory = opened.directory.export
    images = model.images(data.test_images[:7])
    latents = torch.randn(7, model.latent_dim, generator=torch.Generator().manual_seed(0))
    metadata = {"model": json.dumps(model.config["model"]), "pixels": data.pixels, "data": data.dataset}
    with staging_directory(directory) as scratch, torch.no_grad():
        for name in ("encoder", "decoder"):
            weights = {key: value.contiguous() for key, value in getattr(model, name).state_dict().items()}
            safetensors.torch.save_file(weights, scratch / f"{name}.safetensors", metadata)
        encoder = Encoder(model).eval()
        labels = {"labels": data.test_labels[:7]} if model.classes else {}
        codes = ["mean", "log_variance"] if len(encoder(images, *labels.values())) == 2 else ["codes"]
        write_graph(scratch / "encoder.onnx", encoder, {"images": images} | labels, codes)
        write_graph(scratch / "decoder.onnx", Decoder(model).eval(), {"latents": latents} | labels, ["images"])
    return directory


def write_graph(file: Path, module: nn.Module, inputs: dict[str, Tensor], output_names: Sequence[str]) -> None:
    """Write `module` as an ONNX graph for any batch size. Raises UserError if it fails or its outputs differ."""
    import onnxruntime

    batches = [inputs, {name: value[:1] for name, value in inputs.items()}]
    batch_axis = {0: torch.export.Dim("batch")}
    try:
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            dynamic_shapes=(batch_axis,) * len(inputs),
            external_data=False,
            verbose=False,
        )
        assert program is not None
        name_outputs(program.model.graph, output_names)
        program.save(file, external_data=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found_outputs = [session.run(None, {name: x.numpy() for name, x in batch.items()}) for batch in batches]
    except OSError:
        raise
    except Exception as error:  # torch's exporter and onnxruntime raise many kinds for what they do not support
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:300]
        raise UserError(f"{file.name}: this network cannot be written as ONNX ({reason})") from error
    for batch, found_of_batch in zip(batches, found_outputs, strict=True):
        outputs = module(*batch.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for array, expected in zip(found_of_batch, outputs, strict=True):
            found = torch.from_numpy(array)
            if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
                worst = (found - expected).abs().max()
                raise UserError(f"{file.name}: differs from PyTorch by up to {worst:.1e}")


def name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Name the outputs of an ONNX graph. All nodes are renamed first, since one may have such a name already."""
    for node in graph:
        for value in node.outputs:
            value.name = f"node_{value.name}"
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
