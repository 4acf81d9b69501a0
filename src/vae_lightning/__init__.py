"""vae-lightning: a PyTorch Lightning research template for variational autoencoders."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_lightning.analysis.comparisons import compare as compare
    from vae_lightning.analysis.evaluation import evaluate as evaluate
    from vae_lightning.data.folder import FolderDataModule as FolderDataModule
    from vae_lightning.data.module import ImageDataModule as ImageDataModule
    from vae_lightning.data.torchvision_sets import MNISTDataModule as MNISTDataModule
    from vae_lightning.data.torchvision_sets import TorchvisionDataModule as TorchvisionDataModule
    from vae_lightning.models.autoencoder import Autoencoder as Autoencoder
    from vae_lightning.models.backbones import MLP as MLP
    from vae_lightning.models.backbones import Backbone as Backbone
    from vae_lightning.models.backbones import Conv as Conv
    from vae_lightning.models.backbones import ResidualConv as ResidualConv
    from vae_lightning.models.base import ImageModel as ImageModel
    from vae_lightning.models.codes import FiniteScalarQuantizer as FiniteScalarQuantizer
    from vae_lightning.models.codes import UniformCodes as UniformCodes
    from vae_lightning.models.codes import VectorQuantizer as VectorQuantizer
    from vae_lightning.models.flows import FlowPosterior as FlowPosterior
    from vae_lightning.models.flows import FlowPrior as FlowPrior
    from vae_lightning.models.levels import LevelsPosterior as LevelsPosterior
    from vae_lightning.models.levels import LevelsPrior as LevelsPrior
    from vae_lightning.models.likelihoods import Bernoulli as Bernoulli
    from vae_lightning.models.likelihoods import ContinuousBernoulli as ContinuousBernoulli
    from vae_lightning.models.likelihoods import DiscretizedLogistic as DiscretizedLogistic
    from vae_lightning.models.likelihoods import GaussianLikelihood as GaussianLikelihood
    from vae_lightning.models.likelihoods import Likelihood as Likelihood
    from vae_lightning.models.likelihoods import LogisticMixture as LogisticMixture
    from vae_lightning.models.objectives import IWAE as IWAE
    from vae_lightning.models.objectives import DReG as DReG
    from vae_lightning.models.posteriors import FullCovarianceGaussian as FullCovarianceGaussian
    from vae_lightning.models.posteriors import GaussianPosterior as GaussianPosterior
    from vae_lightning.models.posteriors import Posterior as Posterior
    from vae_lightning.models.priors import MixturePrior as MixturePrior
    from vae_lightning.models.priors import Prior as Prior
    from vae_lightning.models.priors import StandardNormal as StandardNormal
    from vae_lightning.models.priors import VampPrior as VampPrior
    from vae_lightning.models.pyramid import Pyramid as Pyramid
    from vae_lightning.models.vae import ELBO as ELBO
    from vae_lightning.models.vae import VAE as VAE
    from vae_lightning.models.vae import Objective as Objective
    from vae_lightning.runs.loading import load_run as load_run

# The same names. They are imported on first use, so that `import vae_lightning` is fast, without torch and Lightning.
_NAMES = {
    "analysis.comparisons": "compare",
    "analysis.evaluation": "evaluate",
    "data.folder": "FolderDataModule",
    "data.module": "ImageDataModule",
    "data.torchvision_sets": "MNISTDataModule TorchvisionDataModule",
    "models.autoencoder": "Autoencoder",
    "models.backbones": "MLP Backbone Conv ResidualConv",
    "models.base": "ImageModel",
    "models.codes": "FiniteScalarQuantizer UniformCodes VectorQuantizer",
    "models.flows": "FlowPosterior FlowPrior",
    "models.levels": "LevelsPosterior LevelsPrior",
    "models.likelihoods": "Bernoulli ContinuousBernoulli GaussianLikelihood Likelihood "
    + "DiscretizedLogistic LogisticMixture",
    "models.objectives": "IWAE DReG",
    "models.posteriors": "FullCovarianceGaussian GaussianPosterior Posterior",
    "models.priors": "MixturePrior Prior StandardNormal VampPrior",
    "models.pyramid": "Pyramid",
    "models.vae": "ELBO VAE Objective",
    "runs.loading": "load_run",
}
_PLACES = {name: f"vae_lightning.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
