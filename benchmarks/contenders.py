"""Ways to train the same VAE on the same images. Each is a subprocess that trains one epoch per request.

    textbook    as in tutorials: torchvision's data set, a DataLoader, default Adam, three `.item()` and three
                TensorBoard scalars per step
    textbook_4  the same, with four worker processes
    plain       a fast loop by hand: images in memory, selected by index, fused Adam, no logging
    train.py    this project, with metrics, TensorBoard, history, health and a checkpoint per epoch
    compiled    the same with `trainer.compile=true`
    jax         one epoch in one jitted scan, if jax is installed
    pythae      Pythae's trainer, if pythae is installed
    limit       only the matrix products of the MLP and fused Adam

    python benchmarks/contenders.py plain mlp_200 100 cpu   # trains an epoch for each line on stdin

All have the same networks, batch size, learning rate and loss. All but `textbook` and `pythae` call this project's
`steady_cpu`, `plain` included.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from vae_lightning.data.torchvision_sets import load_images
from vae_lightning.models.backbones import MLP, Backbone, Conv
from vae_lightning.training.process import steady_cpu
from vae_lightning.training.train import train

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = {"mlp_20": ("mlp", 20), "mlp_200": ("mlp", 200), "conv_20": ("conv", 20), "tiny_20": ("mlp", 20)}
TINY = [8, 8]  # hidden layers of tiny_20: little arithmetic, so that the overhead is measured
Epoch = Callable[[], object]  # trains for one epoch


def networks(system: str) -> Backbone:
    """Build 784-400-400-2d / d-400-400-784, or two convolutions (32 and 64 channels) with a hidden layer of 256."""
    backbone, latent_dim = SYSTEMS[system]
    hidden: dict[str, Any] = {"hidden": TINY} if system == "tiny_20" else {}
    return (MLP if backbone == "mlp" else Conv)(latent_dim=latent_dim, encoder_outputs=2 * latent_dim, **hidden)


class PlainVAE(nn.Module):
    """A VAE in twenty lines of plain PyTorch."""

    def __init__(self, system: str) -> None:
        super().__init__()
        built = networks(system)
        self.encoder, self.decoder = built.encoder, built.decoder

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        reconstruction = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") / len(x)
        kl = -0.5 * torch.sum(1 + log_variance - mean.square() - log_variance.exp()) / len(x)
        return reconstruction + kl, reconstruction, kl


def mnist() -> Tensor:
    """Return the training images, `[60000, 1, 28, 28]`, uint8."""
    (images, _), _ = load_images("MNIST", (ROOT / "data").resolve())
    return images


def plain(system: str, batch: int, device: str) -> Epoch:
    images, model = mnist().to(device), PlainVAE(system).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def epoch() -> None:
        for index in torch.randperm(len(images), device=device).split(batch):
            loss, _, _ = model.loss(images[index].float().div_(255))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def textbook(system: str, batch: int, device: str, workers: int = 0) -> Epoch:
    from torch.utils.data import DataLoader
    from torch.utils.tensorboard import SummaryWriter
    from torchvision import datasets, transforms

    model = PlainVAE(system).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scratch = tempfile.mkdtemp()
    raw = Path(scratch) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        (raw / path.name).symlink_to(path)
    data = datasets.MNIST(scratch, download=True, transform=transforms.ToTensor())
    loader = DataLoader(data, batch_size=batch, shuffle=True, num_workers=workers)
    writer = SummaryWriter(scratch)
    steps = iter(range(10**9))

    def epoch() -> None:
        for x, _ in loader:
            optimizer.zero_grad()
            terms = model.loss(x.to(device))
            terms[0].backward()
            optimizer.step()
            step = next(steps)
            for name, term in zip(("loss", "reconstruction", "kl"), terms, strict=True):
                writer.add_scalar(name, term.item(), step)

    return epoch


def pythae(system: str, batch: int, device: str) -> Epoch:
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    built, latent_dim = networks(system), SYSTEMS[system][1]

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = built.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_variance = self.layers(x).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(built.decoder, nn.Sigmoid())  # Pythae's loss takes probabilities

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=latent_dim, reconstruction_loss="bce")
    options = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        no_cuda=device == "cpu",
        keep_best_on_train=True,
    )
    images = mnist().float() / 255
    trainer = BaseTrainer(
        VAE(config, Encoder(), Decoder()), BaseDataset(images, torch.zeros(len(images))), None, options
    )
    trainer.prepare_training()
    return lambda: trainer.train_step(1)


def jax(system: str, batch: int, device: str) -> Epoch:
    import jax
    import jax.numpy as jnp

    linear = mlp_layers(system)
    weights = [[(jnp.array(m.weight.detach().T), jnp.array(m.bias.detach())) for m in part] for part in linear]
    images = jnp.array(mnist().flatten(1).numpy())

    def mlp(part, x):
        for w, b in part[:-1]:
            x = jax.nn.relu(x @ w + b)
        return x @ part[-1][0] + part[-1][1]

    def loss(weights, x, key):
        mean, log_variance = jnp.split(mlp(weights[0], x), 2, axis=1)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        logits = mlp(weights[1], z)
        reconstruction = jnp.sum(jax.nn.softplus(logits) - x * logits)
        kl = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance))
        return (reconstruction + kl) / batch

    def step(carry, inputs):
        weights, first, second, n = carry
        index, key = inputs
        gradient = jax.grad(loss)(weights, images[index].astype(jnp.float32) / 255, key)
        n = n + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        rate = 1e-3 * jnp.sqrt(1 - 0.999**n) / (1 - 0.9**n)
        weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + 1e-8), weights, first, second)
        return (weights, first, second, n), None

    @jax.jit
    def scan(carry, key):
        order, noise = jax.random.split(key)
        steps = len(images) // batch
        indices = jax.random.permutation(order, len(images))[: steps * batch].reshape(steps, batch)
        return jax.lax.scan(step, carry, (indices, jax.random.split(noise, steps)))[0]

    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = [(weights, zeros, zeros, jnp.float32(0)), jax.random.key(0)]

    def epoch() -> None:
        state[1], key = jax.random.split(state[1])
        state[0] = jax.block_until_ready(scan(state[0], key))

    return epoch


def mlp_layers(system: str) -> list[list[nn.Linear]]:
    if SYSTEMS[system][0] != "mlp":
        raise SystemExit("supports the MLP only")
    built = networks(system)
    return [[m for m in part.modules() if isinstance(m, nn.Linear)] for part in (built.encoder, built.decoder)]


def limit(system: str, batch: int, device: str) -> Epoch:
    """Compute outputs, weight gradients and input gradients of every layer as matrix products on allocated tensors."""
    encoder, decoder = mlp_layers(system)
    layers = [layer.to(device) for layer in encoder + decoder]
    parameters = [p for layer in layers for p in layer.parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    inputs = [torch.randn(batch, layer.in_features, device=device) for layer in layers]
    outputs = [torch.randn(batch, layer.out_features, device=device) for layer in layers]

    @torch.no_grad()
    def epoch() -> None:
        for _ in range(60_000 // batch):
            for layer, x, g in zip(layers, inputs, outputs, strict=True):
                torch.mm(x, layer.weight.T)
                torch.mm(g.T, x)
                if layer is not layers[0]:
                    torch.mm(g, layer.weight)
            optimizer.step()

    return epoch


class Turns(Callback):
    """Wait for a request before each epoch, and report the time of the last epoch, with its checkpoints."""

    started = 0.0

    def on_train_epoch_start(self, trainer, module) -> None:
        if self.started:
            finish(trainer.strategy.root_device.type)
            answer(time.perf_counter() - self.started)
        if not sys.stdin.readline():
            sys.exit()
        self.started = time.perf_counter()


class FirstStep(Callback):
    """Print the time of day after the first step, and stop."""

    def on_train_batch_end(self, trainer, *rest) -> None:
        print("first step", time.time(), flush=True)
        sys.exit()


def train_config(system: str, batch: int, device: str, callback: str) -> dict[str, Any]:
    """Return the configuration of `python train.py …` on all 60,000 images, with one more callback."""
    backbone, latent_dim = SYSTEMS[system]
    overrides = [f"model/backbone={backbone}", f"model.latent_dim={latent_dim}", f"data.batch_size={batch}"]
    overrides += [f"model.backbone.hidden={TINY}"] if system == "tiny_20" else []
    overrides += ["data.val_size=0", "trainer.max_epochs=1000", f"trainer.accelerator={device.replace('cuda', 'gpu')}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    with open_dict(composed):
        del composed["hydra"], composed["resume"]
    config: Any = OmegaConf.to_container(composed, resolve=True)
    config["data"]["root"] = str(ROOT / "data")
    config["trainer"]["callbacks"] = [{"_target_": callback}]
    config["trainer"]["enable_progress_bar"] = False
    return config


def train_py(system: str, batch: int, device: str, compiled: bool = False) -> None:
    config = train_config(system, batch, device, "contenders.Turns")
    config["trainer"]["compile"] = compiled
    with tempfile.TemporaryDirectory() as directory:
        train(config, Path(directory) / "run")


def finish(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def answer(seconds: float) -> None:
    """Print the seconds of an epoch and the peak memory, of the GPU or this process, as one line of JSON."""
    on_gpu = torch.cuda.is_initialized()
    used = torch.cuda.max_memory_reserved() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    megabytes = used / 2**20
    print(json.dumps({"seconds": seconds, "megabytes": megabytes}), file=sys.__stdout__, flush=True)


CONTENDERS = {
    "textbook": textbook,
    "textbook_4": partial(textbook, workers=4),
    "plain": plain,
    "train.py": train_py,
    "compiled": partial(train_py, compiled=True),
    "jax": jax,
    "pythae": pythae,
    "limit": limit,
}


def main() -> None:
    name, system, batch, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    if name not in ("textbook", "textbook_4", "pythae"):  # run as users run them
        steady_cpu()
    torch.manual_seed(0)
    epoch = CONTENDERS[name](system, batch, device)
    for _ in sys.stdin:
        started = time.perf_counter()
        epoch()
        finish(device)
        answer(time.perf_counter() - started)


if __name__ == "__main__":
    main()
