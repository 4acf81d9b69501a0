"""vae-lightning: a PyTorch Lightning research template for variational autoencoders."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_lightning.data.mnist import MNISTDataModule
    from vae_lightning.models.autoencoder import Autoencoder
    from vae_lightning.models.vae import VAE
    from vae_lightning.runs.loading import load_run

# Imported on first use, so that `import vae_lightning` is fast and loads neither torch nor Lightning.
_MODULES = {
    "VAE": "vae_lightning.models.vae",
    "Autoencoder": "vae_lightning.models.autoencoder",
    "MNISTDataModule": "vae_lightning.data.mnist",
    "load_run": "vae_lightning.runs.loading",
}
__all__ = ["VAE", "Autoencoder", "MNISTDataModule", "load_run"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
