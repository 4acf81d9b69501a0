"""Train a model and leave a run directory; the last line printed is its path.

python train.py                                                     # a 20-dimensional VAE on MNIST, 30 epochs
python train.py model.latent_dim=2 model/backbone=conv              # change any key of the configuration
python train.py model.latent_dim=20 trainer.accelerator=gpu
python train.py experiment=leaky_mlp_200                            # a published system: see conf/experiment/
python train.py -m model.latent_dim=2,5,20,200 model/backbone=mlp,conv   # a sweep: one run directory per job
python train.py resume=outputs/vae/2026-11-21_10-00-00-000000       # resume exactly where it stopped
python train.py model.latent_dim=5 resume=auto                      # start, resume or skip outputs/vae/latent_dim-5
python train.py hparams_search=optuna                               # settings of lowest validation loss
python train.py --cfg job                                           # show the configuration and stop

Exit status: 0 done, 1 a bug, 2 an error that you can fix, 75 stopped by a signal; the run can be resumed.
"""

from vae_lightning.launch.commands import train

if __name__ == "__main__":
    train()
