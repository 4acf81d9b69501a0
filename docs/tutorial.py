# ---
# jupyter:
#   jupytext: {formats: "py:percent"}
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # What a variational autoencoder learns
#
# An autoencoder squeezes an image through a few numbers, z, and draws it again from them. A *variational* autoencoder
# (Kingma & Welling 2014) makes of that a model of how images come about: draw z from a prior p(z), then an image from
# p(x|z). This tutorial trains some on MNIST and looks at them.
#
# It is a Python script in cells. `python docs/tutorial.py` runs it and leaves its pictures in `outputs/tutorial/`; VS
# Code and PyCharm open it as a notebook, and so does Jupyter with jupytext (`pip install jupytext notebook`, then
# `jupytext --to notebook docs/tutorial.py`). The text is about ten epochs; EPOCHS=1 is quick, and learns less.

# %%
import os
import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import torch
from matplotlib.figure import Figure

from vae_lightning import figures
from vae_lightning.analysis import generation
from vae_lightning.models.estimators import importance_weighted_bound, kl_divergence
from vae_lightning.runs.loading import open_run

here = Path.cwd()
os.chdir(next(folder for folder in (here, *here.parents) if (folder / "train.py").exists()))  # the repository's root
EPOCHS = int(os.environ.get("EPOCHS", "10"))
OVERRIDES = os.environ.get("OVERRIDES", "")  # further words for train.py
HERE = Path("outputs/tutorial") / re.sub(r"[^\w.]+", "-", f"{EPOCHS}_epochs {OVERRIDES}".strip())[:100]
number = count(1)


def show(picture: torch.Tensor | Figure) -> None:
    """In a notebook, show a picture; in a script, save it."""
    file = HERE / f"{next(number):02d}.png"
    figures.save(picture, file)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(str(file)))
    else:
        print(file)


# %% [markdown]
# ## Training
#
# A run is one command, and leaves one directory; a sweep (`-m`) leaves one for each job. Five runs: VAEs with 2, 5, 20
# and 200 latent dimensions, and a plain autoencoder with 2 to compare with.


# %%
def train(*words: str) -> None:
    """`python train.py …`"""
    command = [sys.executable, "train.py", *words, f"trainer.max_epochs={EPOCHS}", *OVERRIDES.split()]
    if subprocess.run(command).returncode:
        raise SystemExit(f"{' '.join(command)} failed: what it printed says why")


if not (HERE / "vae_200" / "metrics.json").exists():
    train("-m", "model.latent_dim=2,5,20,200", f"hydra.sweep.dir={HERE}", "hydra.sweep.subdir=vae_${model.latent_dim}")
if not (HERE / "autoencoder_2" / "metrics.json").exists():
    train("model=autoencoder", "model.latent_dim=2", f"hydra.run.dir={HERE}/autoencoder_2")

vaes = {d: open_run(HERE / f"vae_{d}", "cpu") for d in (2, 5, 20, 200)}
autoencoder = open_run(HERE / "autoencoder_2", "cpu")

# %% [markdown]
# ## How much fits into d numbers
#
# The first of each digit in the test set, and what the models make of it. Two numbers hold the digit and its slant, 20
# nearly everything. 200 are no better than 20: a VAE leaves the dimensions alone that do not pay.

# %%
run = vaes[2]
digits = generation.first_of_each_digit(run)
x = run.model.images(run.data.test_images[digits])
rows = torch.stack([x, *(run.model.reconstruct(x) for run in vaes.values())])
show(figures.labelled_rows(rows, ["test images", *(f"{d} numbers" for d in vaes)]))

# %% [markdown]
# ## The two terms of the ELBO
#
# Training maximises a lower bound on log p(x), the ELBO:
#
# log p(x) ≥ E[log p(x|z)] − KL(q(z|x) ‖ p(z))
#
# *Reconstruction* (−E log p(x|z)) says how many nats are missing when the image is drawn from z; *KL* says how many
# nats z carries about the image beyond what the prior knew. More dimensions buy reconstruction with KL.

# %%
for d, run in vaes.items():
    x = run.model.images(run.data.test_images[:1000])
    with torch.no_grad():
        terms = {name: values.mean().item() for name, values in run.model.elbo(x).items()}
    print(
        f"d = {d:3}: reconstruction {terms['reconstruction']:6.2f} + kl {terms['kl']:5.2f} = {-terms['elbo']:6.2f} nats"
    )

# %% [markdown]
# The KL of each dimension shows which ones are used: at 200, many stay near the prior, with a KL near 0.

# %%
with torch.no_grad():
    posterior = vaes[200].model.encode(x)
    per_dimension = kl_divergence(posterior.mean, posterior.log_variance).mean(dim=0).sort(descending=True).values
print("nats, largest first:", [round(value, 2) for value in per_dimension[:25].tolist()])
print("dimensions with more than 0.01 nats:", int((per_dimension > 0.01).sum()), "of 200")

# %% [markdown]
# The bound becomes tighter with importance samples: log (1/k) Σ p(x,z)/q(z|x) rises towards log p(x) with k. (These are
# grey pixels, on which the Bernoulli "likelihood" is a cross-entropy; docs/numbers.md says when numbers compare.)

# %%
with torch.no_grad():
    log_weights = vaes[20].model.log_weights(x[:200], k=500)  # [500, 200], in nats
for k in (1, 5, 50, 500):
    print(f"k = {k:3}: {importance_weighted_bound(log_weights[:k]).mean():.2f}")

# %% [markdown]
# ## The map of digits
#
# With two latent dimensions there is a map: each test image where its posterior mean lies, and the plane decoded.

# %%
show(generation.scatter(vaes[2]))
show(generation.manifold(vaes[2]))
show(generation.decode(vaes[2], z=[[0.5, 0.0], [2.0, 0.0]]))

# %% [markdown]
# ## New digits
#
# Draw z from the prior, and decode it. A lower temperature stays nearer to the middle: cleaner digits, fewer kinds. To
# see that they are not copies, look at the training images nearest to them.

# %%
show(generation.samples(vaes[20], n=40, columns=10))
show(generation.samples(vaes[20], n=40, columns=10, temperature=0.6))
show(generation.nearest(vaes[20]))

# %% [markdown]
# ## Why not a plain autoencoder?
#
# It reconstructs as well or better, for nothing asks its codes to be anywhere in particular. That is the trouble: where
# does one draw z from? Its codes lie far out, with holes between them, and z ~ N(0, I) lands where no image ever was.
# The KL of a VAE packs the codes around 0 so that every such z means something.

# %%
show(generation.scatter(autoencoder))
z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    both = torch.stack([run.model.pictures(z[:10]) for run in (vaes[2], autoencoder)])
show(figures.labelled_rows(both, ["VAE", "autoencoder"]))
codes = autoencoder.model.all_codes(autoencoder.data.test_images)
print("autoencoder: codes have mean", codes.mean(dim=0).tolist(), "and standard deviation", codes.std(dim=0).tolist())

# %% [markdown]
# ## On the way from one digit to another
#
# Between two codes lie images, too. And one dimension at a time, most active first, shows what each has come to mean.

# %%
show(generation.interpolations(vaes[20]))
show(generation.traversals(vaes[20]))

# %% [markdown]
# From here: `python explore.py run=outputs/tutorial/10_epochs/vae_2` walks over the map with the mouse, `python
# evaluate.py run=outputs/tutorial/10_epochs/vae_20` measures what a model is worth, and docs/guides.md changes it.
