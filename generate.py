"""Draw what a trained run has learnt, into its figures/; the last line printed is the picture's path.

    python generate.py run=outputs/… what=samples n=100 temperature=0.8
    python generate.py run=outputs/… what=reconstructions images=[3,18,61]
    python generate.py run=outputs/… what=manifold                   # latent_dim=2; else plane=principal or plane=[1,2]
    python generate.py run=outputs/… what=scatter format=pdf
    python generate.py run=outputs/… what=traversals
    python generate.py run=outputs/… what=interpolations
    python generate.py run=outputs/… what=decode z=[0.5,0]
    python generate.py run=outputs/… what=nearest                    # samples above the training images nearest to them
    python generate.py run=outputs/… what=walk                       # an animated GIF

See conf/generate.yaml for the options.
"""

from vae_lightning.analysis.generation import generate_run
from vae_lightning.launch.cli import command_line, one_line_errors

if __name__ == "__main__":
    with one_line_errors("generate"):
        print(generate_run(command_line("generate", __doc__)))
