"""Compile the loss of a batch and its gradient into one graph with PyTorch's compiler: `trainer.compile`.

The graph is C++ code on a CPU. On a GPU it is Triton kernels, replayed as a CUDA graph. The optimizer runs as before,
so clipping, callbacks and every optimizer work. Random numbers are those of uncompiled training, and results differ by
rounding only. If the loss cannot be compiled, the log says why, and training continues uncompiled.

Only `trainer.compile=true` and `vae evaluate --compile` import this file. It uses one private setting of PyTorch,
`torch._dynamo.config.trace_autograd_ops`. Where that is missing, training runs uncompiled.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from vae_lightning.models.base import ImageModel

log = logging.getLogger(__name__)
LossAndTerms = tuple[Tensor, dict[str, Tensor]]


class Compile(Callback):
    """Replace the model's `loss_and_terms` by a compiled one during training."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        module.to(memory_format=torch.channels_last)  # convolutions need no conversion: an eighth faster on a CPU

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, ImageModel)
        reasons = {
            "several processes": trainer.world_size > 1,
            "trainer.detect_anomaly=true": torch.is_anomaly_enabled(),
            "the gradient scaler of trainer.precision=16-mixed": trainer.scaler is not None,
            f"PyTorch {torch.__version__} cannot trace gradients": not can_trace_gradients(),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason:
            say_uncompiled(reason)
        else:
            log.info("trainer.compile: the first step takes 10 to 20 s, and about 3 s in later runs")
            data = trainer.datamodule  # type: ignore[attr-defined]
            batch_size = min(data.batch_size, len(data.train_images))
            torch.compiler.reset()  # models trained before in this process would count towards a limit of eight
            module.loss_and_terms = CompiledLoss(module, batch_size)  # type: ignore[method-assign]

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        vars(module).pop("loss_and_terms", None)


def can_trace_gradients() -> bool:
    """Allow `torch.autograd.grad` in compiled functions. Return whether this version of PyTorch can do this."""
    from torch._dynamo import config  # slow to import

    if not hasattr(config, "trace_autograd_ops"):
        return False
    config.trace_autograd_ops = True
    return True


class Compiled:
    """A compiled function of tensors, without graph breaks. If it cannot be compiled, the function itself."""

    def __init__(self, function: Callable[..., Any], device: torch.device, cuda_graph: bool = False) -> None:
        self.function = function
        # With cpp_wrapper, no Python runs between the kernels. fallback_random draws the numbers of uncompiled PyTorch.
        # A CUDA graph overwrites its results when it runs again.
        options: dict[str, Any] = {"cpp_wrapper": True} if device.type == "cpu" else {"triton.cudagraphs": cuda_graph}
        # PyTorch warns of a missing GPU whenever it compiles C++ code.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        compiler = torch.compile(fullgraph=True, dynamic=False, options=options | {"fallback_random": True})
        self.compiled: Callable[..., Any] | None = compiler(function)

    def __call__(self, *inputs: Any) -> Any:
        if self.compiled is not None:
            try:
                return self.compiled(*inputs)
            except Exception as error:  # of many types: no C++ compiler, an operation that cannot be traced, …
                say_uncompiled(summary(error))
                self.compiled = None
        return self.function(*inputs)


class CompiledLoss:
    """A compiled `loss_and_terms` for batches of one size. Others, such as a smaller last batch, run uncompiled."""

    def __init__(self, model: ImageModel, batch_size: int) -> None:
        self.uncompiled = model.loss_and_terms
        self.batch_size = batch_size
        self.parameters = list(model.parameters())
        self.with_gradients = Compiled(self._with_gradients, model.device, cuda_graph=True)

    def _with_gradients(
        self, x: Tensor, labels: Tensor | None, epoch: Tensor, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor | None, ...]]:
        loss, terms = self.uncompiled(x, labels, epoch)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach(), {name: term.detach() for name, term in terms.items()}, gradients

    def __call__(self, x: Tensor, labels: Tensor | None, epoch: float) -> LossAndTerms:
        if self.with_gradients.compiled is None or len(x) != self.batch_size:
            return self.uncompiled(x, labels, epoch)
        parameters = [parameter for parameter in self.parameters if parameter.requires_grad]
        # A float would be a constant of the graph, so the epoch is a tensor.
        epoch_tensor = torch.full((), epoch, device=x.device)
        loss, terms, gradients = self.with_gradients(x, labels, epoch_tensor, parameters)
        loss = loss.clone().requires_grad_()
        loss.register_hook(partial(add_gradients, parameters, list(gradients)))  # called by backward()
        return loss, terms


def add_gradients(parameters: Sequence[nn.Parameter], gradients: list[Tensor | None], factor: Tensor) -> None:
    """Add `factor` times the gradients to those of the parameters, and empty the list, which frees their memory."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if gradient.device.type == "cuda" or factor != 1:  # a copy: the CUDA graph of the next step overwrites it
            gradient = factor * gradient
        if gradient.stride() != parameter.stride():  # fused optimizers need the same layout
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    gradients.clear()


def say_uncompiled(reason: str) -> None:
    log.warning("compile=true has no effect: %s", reason)


def summary(error: Exception) -> str:
    """Return the cause of an error of the compiler, and the line of the code that it names, in one line."""
    said = str(error).removeprefix("backend='inductor' raised:").strip()
    cause = said.partition("\n")[0][:200]
    places = re.findall(r'File "(.+?)", line (\d+)', said.partition("from user code")[2])
    return f"{cause} (at {places[-1][0]}:{places[-1][1]})" if places else cause
