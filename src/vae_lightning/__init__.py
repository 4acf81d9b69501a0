"""vae-lightning: a PyTorch Lightning research template for variational autoencoders."""

import atexit
import gc

collecting = gc.isenabled()
gc.disable()  # nothing of what imports make is garbage, and looking for it takes a fifth of the time to start
from vae_lightning.runs import load_run  # noqa: E402

gc.freeze()  # nor will it be,
atexit.register(gc.unfreeze)  # before the end
if collecting:
    gc.enable()

__all__ = ["load_run"]
