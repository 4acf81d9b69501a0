"""Export a trained run as ONNX and safetensors: `python export.py --help`."""

from vae_lightning.launch.commands import export

if __name__ == "__main__":
    export()
