"""Codec plug-ins for tests, as packages that a process finds when their folder is on its path."""

from __future__ import annotations

import textwrap
from pathlib import Path


def install_codec_plugin(site: Path, name: str, source: str) -> Path:
    """Write a module with a `plugin` object and its entry point below `site`; returns `site`, for PYTHONPATH."""
    info = site / f"{name}_codec-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}_codec.py").write_text(textwrap.dedent(source))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-codec\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[latentloom.codecs]\n{name} = {name}_codec:plugin\n")
    return site


# Encodes like the codec in the directory, but for what a file in the folder LATENTLOOM_TEST_FAULTS asks:
#   no_gpu   a process that is given the GPU of this number (*: any) cannot load
#   no_load  "a b": of all loads together, those from number a up to b fail
#   cublas   "a b": of all processes' calls together, those from number a up to b fail as the device's library would
#   broken   every call fails with an error that nobody has ever seen
#   latent   decoding a latent of this hash ends the process; "#n": the n-th different one, whose hash is kept
# Besides, encoding an image whose first pixel is pure magenta ends the process.
FAULTY = '''
import hashlib
import os
from pathlib import Path
from pipeline.codec.codec import load_codec
from pipeline.codec.codec import codec_info

def asked(name):
    file = Path(os.environ["LATENTLOOM_TEST_FAULTS"], name)
    return file.read_text() if file.exists() else None

def fails_now(name):
    """Whether this call is one of those that are to fail: each takes the next number, a file of its own."""
    first, stop = map(int, (asked(name) or "0 0").split())
    for number in range(stop):
        try:
            Path(os.environ["LATENTLOOM_TEST_FAULTS"], f"{name}-{number}").touch(exist_ok=False)
            return number >= first
        except FileExistsError:
            continue
    return False

class Faulty:
    def read_info(self, path, revision):
        return codec_info(path)
    def load(self, path, revision, info, *, device, dtype, compile, channels_last):
        if fails_now("no_load") or asked("no_gpu") in ("*", os.environ.get("CUDA_VISIBLE_DEVICES", "")):
            raise RuntimeError("No CUDA GPUs are available")
        inner = load_codec(path, device=device, dtype=dtype)
        seen = set()
        class Codec:
            info = inner.info
            def decode(self, latents_NCHW):
                for latent in latents_NCHW:
                    name, fatal = hashlib.sha256(latent.float().numpy().tobytes()).hexdigest(), asked("latent")
                    seen.add(name)
                    if fatal == f"#{len(seen)}":
                        Path(os.environ["LATENTLOOM_TEST_FAULTS"], "latent").write_text(name)
                    if fatal in (name, f"#{len(seen)}"):
                        os._exit(139)
                return inner.decode(latents_NCHW)
            def encode(self, images_NHWC, *, posterior="mode", seeds=None):
                if fails_now("cublas"):
                    raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`")
                if asked("broken"):
                    raise ValueError("planted: nobody has ever seen this")
                first = images_NHWC[:, 0, 0].int()
                if ((first[:, 0] == 255) & (first[:, 1] == 0) & (first[:, 2] == 255)).any():
                    os._exit(139)
                return inner.encode(images_NHWC, posterior=posterior, seeds=seeds)
        return Codec()

plugin = Faulty()
'''
