"""Images to latents, latents to a trained diffusion model: the package that other programs import.

The jobs are the command `latentloom`; what they are made of lies in `pipeline`, whose names may change.
"""

from importlib import metadata

try:
    __version__ = metadata.version("latentloom")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+checkout"
