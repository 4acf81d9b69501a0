"""Train a model and leave a run directory; the last line printed is its path.

python train.py                                                     # a 20-dimensional VAE on MNIST, 30 epochs
python train.py model.latent_dim=2 model/backbone=conv              # any key of the configuration
python train.py model.latent_dim=20 trainer.accelerator=gpu
python train.py experiment=leaky_mlp_200                            # a published system: see conf/experiment/
python train.py -m model.latent_dim=2,5,20,200 model/backbone=mlp,conv   # a sweep, one run directory a job
python train.py resume=outputs/vae/2026-11-21_10-00-00-000000       # go on exactly where it stopped
python train.py repeat=outputs/vae/2026-11-21_10-00-00-000000       # the same once more: the same numbers
python train.py hparams_search=optuna                               # settings of lowest validation loss
python train.py --cfg job                                           # show the configuration and stop

Exit status: 0 done, 1 a bug, 2 something to mend, 75 stopped by a signal and waiting to be resumed.
"""

import hydra
from omegaconf import DictConfig

from vae_lightning.launch.cli import one_line_errors, plain, print_once
from vae_lightning.launch.jobs import job, plan_job, resumable, runs_apart, train_job_apart
from vae_lightning.launch.search import search
from vae_lightning.runs.resume import run_config
from vae_lightning.training.train import train


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    with job("train") as directory:
        if options := config.get("hparams_search"):
            with resumable(directory, "the same command"):
                print_once(search(run_config(plain(config)), plain(options), directory))
            return
        plan = plan_job(plain(config), directory)
        if not plan.finished:
            with resumable(plan.run.path):
                if runs_apart(plan, config.timeout):
                    train_job_apart(plan, config.timeout)
                else:
                    train(plan.config, plan.run, plan.resume)
        print_once(plan.run)


if __name__ == "__main__":
    with one_line_errors("train"):
        main()
