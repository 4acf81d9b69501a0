import pytest
import torch
from torch import nn

from vae_lightning.backbones import MLP, Conv
from vae_lightning.config import ConfigError
from vae_lightning.runs import count_parameters


@pytest.mark.parametrize("backbone", [MLP, Conv])
@pytest.mark.parametrize("latent_dim", [1, 2, 5, 20, 200])
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes(backbone: type, latent_dim: int, batch: int) -> None:
    network = backbone(latent_dim=latent_dim, encoder_outputs=2 * latent_dim)
    assert network.encoder(torch.rand(batch, 1, 28, 28)).shape == (batch, 2 * latent_dim)
    assert network.decoder(torch.randn(batch, latent_dim)).shape == (batch, 1, 28, 28)


@pytest.mark.parametrize("backbone", [MLP, Conv])
@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 27, 31), (2, 8, 8)])
def test_any_image_shape(backbone: type, image_shape: tuple[int, ...]) -> None:
    network = backbone(latent_dim=4, encoder_outputs=8, image_shape=image_shape)
    assert network.encoder(torch.rand(2, *image_shape)).shape == (2, 8)
    assert network.decoder(torch.randn(2, 4)).shape == (2, *image_shape)


def test_conv_autoencoder_4_has_the_shapes_of_its_document() -> None:
    network = Conv(4, 4, channels=[8, 16, 32], padding=[1, 1, 0], batch_norm=[2], hidden=[128])
    assert count_parameters(network.encoder) == 43_428
    shapes: list[tuple[int, ...]] = []
    kinds = (nn.Conv2d, nn.Flatten, nn.Linear, nn.ConvTranspose2d)
    for layer in [*network.encoder, *network.decoder]:
        if isinstance(layer, kinds):
            layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    network.decoder(network.encoder(torch.rand(1, 1, 28, 28)))
    assert shapes == [
        (8, 14, 14), (16, 7, 7), (32, 3, 3), (288,), (128,), (4,),
        (128,), (288,), (16, 7, 7), (8, 14, 14), (1, 28, 28),
    ]  # fmt: skip
    assert isinstance(network.encoder[3], nn.BatchNorm2d)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in [*network.encoder, *network.decoder]) == 2


def test_depth_width_and_activation() -> None:
    network = MLP(2, 4, hidden=[30, 20, 10], activation="leaky_relu")
    widths = [layer.out_features for layer in network.encoder if isinstance(layer, nn.Linear)]
    mirrored = [layer.out_features for layer in network.decoder if isinstance(layer, nn.Linear)]
    assert (widths, mirrored) == ([30, 20, 10, 4], [10, 20, 30, 784])
    slopes = [layer.negative_slope for layer in network.encoder if isinstance(layer, nn.LeakyReLU)]
    assert slopes == [0.2] * 3
    for activation in ("relu", "elu", "gelu", "silu", "softplus", "tanh"):
        assert MLP(2, 4, hidden=[3], activation=activation).encoder(torch.rand(1, 1, 28, 28)).isfinite().all()


def test_the_callers_lists_are_left_alone() -> None:
    hidden, channels = [30, 20], [4, 8]
    MLP(2, 4, hidden=hidden)
    Conv(2, 4, hidden=hidden, channels=channels)
    assert (hidden, channels) == ([30, 20], [4, 8])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": [4] * 4, "padding": 0}, "4 convolutions of stride 2 are too many for 28×28 pixels; 3 fit"),
        ({"channels": [4, 8], "padding": [1]}, "one entry for each of the 2"),
        ({"channels": [4, 8], "batch_norm": [3]}, "there are 2 convolutions"),
    ],
)
def test_impossible_convolutions(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Conv(2, 4, **arguments)
