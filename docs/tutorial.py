# ---
# jupyter:
#   jupytext: {formats: "py:percent"}
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # What a variational autoencoder learns
#
# This tutorial trains variational autoencoders on MNIST. It shows the effect of the latent dimension, the two terms of
# the ELBO, the latent space, and samples.
#
# An autoencoder encodes an image as a few numbers, the latent vector z, and decodes the image from z. A *variational*
# autoencoder (Kingma & Welling 2014) turns this into a generative model: draw z from a prior p(z), then draw an image
# from p(x|z).
#
# `python docs/tutorial.py` runs this file as a script and writes its figures to `outputs/tutorial/`. VS Code and
# PyCharm open it as a notebook. Jupyter needs jupytext: `pip install jupytext notebook`, then `jupytext --to notebook
# docs/tutorial.py`. The text describes results after ten epochs. Set EPOCHS=1 for a quick run.

# %%
import os
import sys
from itertools import count
from pathlib import Path

import torch
from lightning import Trainer
from matplotlib.figure import Figure

from vae_lightning import VAE, Autoencoder, ImageModel, MNISTDataModule, figures, load_run
from vae_lightning.analysis import generation
from vae_lightning.models.estimators import importance_weighted_bound, kl_divergence
from vae_lightning.runs.directory import RunDirectory
from vae_lightning.runs.loading import Run

EPOCHS = int(os.environ.get("EPOCHS", "10"))
BATCHES = int(os.environ.get("BATCHES", "0"))  # of an epoch; 0: all
HERE = Path(f"outputs/tutorial/{EPOCHS}_epochs{f'_of_{BATCHES}_batches' if BATCHES else ''}")
number = count(1)


def show(figure: torch.Tensor | Figure) -> None:
    """Save a figure; display it in a notebook, print its path in a script."""
    file = HERE / f"{next(number):02d}.png"
    figures.save(figure, file)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(str(file)))
    else:
        print(file)


# %% [markdown]
# ## Training
#
# A model is a LightningModule, and Lightning's `Trainer` trains it. Here are five models: VAEs with 2, 5, 20 and 200
# latent dimensions, and a plain autoencoder with 2 for comparison. A model that an earlier start of this script has
# trained is loaded from its checkpoint.

# %%
data = MNISTDataModule()
data.setup()


def trained(model: ImageModel, name: str) -> Run:
    """Train a model, or load it if it is trained already."""
    file = HERE / f"{name}.ckpt"
    if not file.exists():
        trainer = Trainer(
            max_epochs=EPOCHS, limit_train_batches=BATCHES or 1.0, logger=False, enable_checkpointing=False
        )
        trainer.fit(model, data)
        trainer.save_checkpoint(file)
    return Run(RunDirectory(HERE), file, load_run(file), data)


vaes = {d: trained(VAE(latent_dim=d), f"vae_{d}") for d in (2, 5, 20, 200)}
autoencoder = trained(Autoencoder(latent_dim=2), "autoencoder_2")

# %% [markdown]
# ## The latent dimension
#
# The figure shows the first test image of each digit and its reconstructions. Two dimensions encode the digit and its
# slant, 20 encode nearly everything. 200 are no better than 20: a VAE does not use a dimension if its KL costs more
# than the reconstruction gains.

# %%
run = vaes[2]
digits = generation.first_of_each_digit(run)
x = run.model.images(run.data.test_images[digits])
rows = torch.stack([x, *(run.model.reconstruct(x) for run in vaes.values())])
show(figures.labelled_rows(rows, ["test images", *(f"d = {d}" for d in vaes)]))

# %% [markdown]
# ## The two terms of the ELBO
#
# Training maximises a lower bound on log p(x), the ELBO:
#
# log p(x) ≥ E[log p(x|z)] − KL(q(z|x) ‖ p(z))
#
# The *reconstruction* term, −E log p(x|z), measures in nats how badly z predicts the image. The *KL* term measures how
# much information z carries about the image. From 2 to 20 dimensions, the reconstruction improves and the KL grows.

# %%
for d, run in vaes.items():
    x = run.model.images(run.data.test_images[:1000])
    with torch.no_grad():
        terms = {name: values.mean().item() for name, values in run.model.elbo(x).items()}
    print(
        f"d = {d:3}: reconstruction {terms['reconstruction']:6.2f} + kl {terms['kl']:5.2f} = {-terms['elbo']:6.2f} nats"
    )

# %% [markdown]
# The KL of each dimension shows whether it is used. Of 200 dimensions, many stay at the prior, with a KL near 0.

# %%
with torch.no_grad():
    posterior = vaes[200].model.encode(x)
    per_dimension = kl_divergence(posterior.mean, posterior.log_variance).mean(dim=0).sort(descending=True).values
print("nats, largest first:", [round(value, 2) for value in per_dimension[:25].tolist()])
print("dimensions with more than 0.01 nats:", int((per_dimension > 0.01).sum()), "of 200")

# %% [markdown]
# More importance samples make the bound tighter: as k grows, log (1/k) Σ p(x,z)/q(z|x) rises towards log p(x). The
# pixels are grey, so the Bernoulli term is a cross-entropy. docs/numbers.md says which numbers may be compared.

# %%
with torch.no_grad():
    log_weights = vaes[20].model.log_weights(x[:200], k=500)  # [500, 200], in nats
for k in (1, 5, 50, 500):
    print(f"k = {k:3}: {importance_weighted_bound(log_weights[:k]).mean():.2f}")

# %% [markdown]
# ## The latent space
#
# Two latent dimensions can be plotted. The figures show the posterior means of the test images, the decoded latent
# plane, and two decoded points.

# %%
show(generation.scatter(vaes[2]))
show(generation.manifold(vaes[2]))
show(generation.decode(vaes[2], z=[[0.5, 0.0], [2.0, 0.0]]))

# %% [markdown]
# ## Samples
#
# Draw z from the prior and decode it. A lower temperature draws z closer to the mean of the prior: the digits are
# cleaner but less varied. The nearest training images show that samples are not copies.

# %%
show(generation.samples(vaes[20], n=40, columns=10))
show(generation.samples(vaes[20], n=40, columns=10, temperature=0.6))
show(generation.nearest(vaes[20]))

# %% [markdown]
# ## Why not a plain autoencoder?
#
# A plain autoencoder reconstructs as well or better, because its codes are not constrained. But it has no distribution
# to draw z from. Its codes lie far from 0 with gaps between them, and z ~ N(0, I) falls where there are no codes. The
# KL term of a VAE keeps the codes close to N(0, I), so that samples from the prior decode to digits.

# %%
show(generation.scatter(autoencoder))
z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    both = torch.stack([run.model.decode_images(z[:10]) for run in (vaes[2], autoencoder)])
show(figures.labelled_rows(both, ["VAE", "autoencoder"]))
codes = autoencoder.model.all_codes(autoencoder.data.test_images)
print("autoencoder: codes have mean", codes.mean(dim=0).tolist(), "and standard deviation", codes.std(dim=0).tolist())

# %% [markdown]
# ## Interpolations and traversals
#
# Interpolations decode points between two codes: the image changes gradually. Traversals change one latent dimension
# each, the most active first, and show what it encodes.

# %%
show(generation.interpolations(vaes[20]))
show(generation.traversals(vaes[20]))

# %% [markdown]
# Next steps: `python train.py model.latent_dim=2` writes figures, metrics and its configuration. `vae explore
# latest` shows the latent space of that run in a browser. docs/guides/ shows how to change the model.
