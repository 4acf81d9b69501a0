import pytest
import torch
from torch import nn

from vae_lightning.config import ConfigError
from vae_lightning.models.backbones import MLP, Conv, GatedLinear, ResidualBlock, ResidualConv, output_bias
from vae_lightning.runs.environment import count_parameters


@pytest.mark.parametrize("backbone", [MLP, Conv])
@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 27, 31), (2, 8, 8)])
def test_any_image_shape(backbone: type, image_shape: tuple[int, ...]) -> None:
    network = backbone(latent_dim=4, encoder_outputs=8, image_shape=image_shape)
    assert network.encoder(torch.rand(2, *image_shape)).shape == (2, 8)
    assert network.decoder(torch.randn(2, 4)).shape == (2, *image_shape)


def test_conv_autoencoder_4_has_the_published_shapes() -> None:
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": [4] * 4, "padding": 0}, "too many convolutions of stride 2 for 28×28 pixels; at most 3"),
        ({"channels": [4, 8], "padding": [1]}, "should have 2 entries"),
        ({"channels": [4, 8], "batch_norm": [3]}, "should be from 1 to 2"),
    ],
)
def test_impossible_convolutions(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Conv(2, 4, **arguments)


def test_gated_layers() -> None:
    layer = GatedLinear(3, 2)
    h = torch.randn(5, 3)
    value, gate = layer.both(h).chunk(2, dim=1)
    torch.testing.assert_close(layer(h), value * gate.sigmoid())
    network = MLP(2, 4, hidden=[30, 20], gated=True)
    assert [type(layer) for layer in network.encoder] == [nn.Flatten, GatedLinear, GatedLinear, nn.Linear]
    assert network.decoder(torch.randn(3, 2)).shape == (3, 1, 28, 28)


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("channels", [[8], [8, 16], [8, 16, 12]])
def test_residual_conv(image_shape: tuple[int, ...], channels: list[int]) -> None:
    network = ResidualConv(5, 10, image_shape, channels=channels, blocks=2)
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 2 * 2 * len(channels)
    assert network.encoder(torch.rand(2, *image_shape)).shape == (2, 10)
    assert network.decoder(torch.randn(2, 5)).shape == (2, *image_shape)
    h = torch.randn(2, channels[0], 8, 8)
    torch.testing.assert_close(blocks[0](h), h + blocks[0].residual[-1].bias.reshape(1, -1, 1, 1))


def test_residual_conv_needs_divisible_sides() -> None:
    with pytest.raises(ConfigError, match="needs sides divisible by 8; the images have 28×28 pixels"):
        ResidualConv(5, 10, channels=[4, 4, 4, 4])


@pytest.mark.parametrize("image_shape", [(3, 32, 32), (3, 64, 64), (1, 24, 40)])
def test_spatial_latents_and_group_normalization(image_shape: tuple[int, ...]) -> None:
    positions = image_shape[1] * image_shape[2] // 16
    network = ResidualConv(2 * positions, 4 * positions, image_shape, [8, 16, 16], 1, groups=4, spatial=True)
    assert not any(isinstance(module, nn.Linear) for module in network.modules())
    assert sum(isinstance(module, nn.GroupNorm) for module in network.modules()) == 2 * 3 * 2 + 2
    z = torch.randn(2, 2 * positions)
    assert network.encoder(torch.rand(2, *image_shape)).shape == (2, 4 * positions)
    assert network.decoder(z).shape == (2, *image_shape)
    # A latent is of one position: far from it, it changes the normalization, but not the picture without one.
    plain = ResidualConv(2 * positions, 4 * positions, image_shape, [8, 16, 16], 1, spatial=True)
    moved = z.clone()
    moved[:, 0] += 5  # the upper left corner
    difference = (plain.decoder(moved) - plain.decoder(z)).abs().amax(dim=(0, 1))
    assert difference[0, 0] > 0
    assert difference[-1, -1] == 0


def test_spatial_latents_and_groups_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"spatial=true: latent_dim, .*, is 100; it should be a multiple of 7·7"):
        ResidualConv(100, 200, spatial=True)
    with pytest.raises(ConfigError, match=r"groups=5: should divide all of channels=\[32, 64, 64\]"):
        ResidualConv(20, 40, groups=5)


def test_output_bias() -> None:
    for network, size in ((MLP(2, 4), 784), (ResidualConv(2, 4, channels=[4]), 1)):
        for parameter in network.decoder.parameters():
            nn.init.zeros_(parameter)
        bias = output_bias(network.decoder)
        bias.data.copy_(torch.randn(size))
        expected = bias.reshape(1, *((28, 28) if size > 1 else (1, 1))).expand(1, 28, 28)
        torch.testing.assert_close(network.decoder(torch.randn(1, 2))[0], expected)
