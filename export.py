"""Write the encoder and decoder of a trained run as ONNX and safetensors into its export/, checked against PyTorch.

pip install -e '.[export]'
python export.py run=outputs/…
"""

from vae_lightning.analysis.exporting import export_run
from vae_lightning.config import check_arguments
from vae_lightning.launch.cli import command_line, one_line_errors

if __name__ == "__main__":
    with one_line_errors("export"):
        options = command_line("export", __doc__)
        check_arguments(export_run, options, "")
        print(export_run(**options))
