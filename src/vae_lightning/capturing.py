"""A whole optimizer step as one CUDA graph: one launch in place of some hundred and fifty.

On a GPU the steps of a small model take as long as it takes Python to launch their kernels. A CUDA graph is the kernels
of one step, taken down once and from then on launched together, in the memory of that first time: images are copied to
where they lay then, and the step's terms are found where it left them.

What Python decided while the step was taken down stays decided. So each epoch has a graph of its own, as has a new
learning rate (`key`); a loss that asks `epochs_trained` has none, and one that changes with `global_step` must ask so;
and before its first use the replays of a few steps are compared with the same steps taken one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vae_lightning.checkpoints import random_states, set_random_states
from vae_lightning.model import ImageModel

Step = Callable[[Tensor], dict[str, Tensor]]  # from images to their terms, with an update of the weights on the way
TRIAL_STEPS = 3  # cuBLAS and cuDNN choose their kernels and memory in the first; that the others follow from it shows
# whether replays draw noise and move the weights as steps do


class NotCapturable(Exception):
    """A step that cannot be a graph, and why."""


class Captured:
    """`step` on batches of the shape of `x`, replayed. Raises NotCapturable, with everything as it was before.

    `state` is all that a step changes: weights, buffers, and what the optimizer remembers.
    """

    def __init__(self, step: Step, x: Tensor, state: list[Tensor], model: ImageModel) -> None:
        self.x = x.clone()
        stream = torch.cuda.Stream(x.device) if x.is_cuda else None
        before, random = [tensor.detach().clone() for tensor in state], random_states()

        def restore() -> None:
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
            set_random_states(random)

        try:
            with knowing_no_epoch(model):
                with on(stream):
                    expected = [kept(step(self.x))]
                    with no_waiting(x.device):
                        expected += [kept(step(self.x)) for _ in range(TRIAL_STEPS - 1)]
                restore()
                self.terms, self.replay = record(lambda: step(self.x), stream)
            restore()
            found = [kept(self(x)) for _ in range(TRIAL_STEPS)]
        except Exception as error:  # a loss, or CUDA, may refuse in any way
            raise NotCapturable(" ".join(str(error).split())[:200]) from error
        finally:
            restore()
        if not torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-3, atol=1e-3):
            raise NotCapturable("its replays differ from its steps")

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """One step. The terms are those of this call until the next one."""
        self.x.copy_(x)
        self.replay()
        return self.terms


def record(call: Callable[[], dict[str, Tensor]], stream: Any) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """What `call` returns, and what puts the results of another such call into the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return result, graph.replay


def key(x: Tensor, state: list[Tensor], optimizer: torch.optim.Optimizer) -> Hashable:
    """What must be as it was for a graph to be of use: shapes, settings of the optimizer, places in memory."""
    values = [[value for name, value in group.items() if name != "params"] for group in optimizer.param_groups]
    settings = [[v.item() if isinstance(v, Tensor) else v for v in of_group] for of_group in values]
    return x.shape, x.dtype, repr(settings), tuple(tensor.data_ptr() for tensor in state)


def state_of(model: ImageModel, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that a step changes."""
    remembered = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.parameters(), *model.buffers(), *(value for value in remembered if isinstance(value, Tensor))]


def kept(terms: dict[str, Tensor]) -> Tensor:
    """A copy of a step's terms, `[terms, batch]`."""
    return torch.stack(list(terms.values())).detach()


@contextmanager
def knowing_no_epoch(model: ImageModel) -> Iterator[None]:
    """Meanwhile a loss that asks how far training is gets no number, and fails: the answer would stay for good."""
    model.__dict__["epochs_trained"] = object
    try:
        yield
    finally:
        del model.__dict__["epochs_trained"]


@contextmanager
def on(stream: Any) -> Iterator[None]:
    """Work on a stream of its own, before and after everything else. None: where all work is."""
    if stream is None:
        yield
        return
    everything_else = torch.cuda.current_stream(stream.device)
    stream.wait_stream(everything_else)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        everything_else.wait_stream(stream)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Meanwhile whatever makes Python wait for the GPU raises RuntimeError: a graph could not hold it."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
