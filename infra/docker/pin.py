#!/usr/bin/env python3
"""Write the digests of pushed images to where every cluster takes them from, kuberay/components/images.

    pin.py registry.example/latentloom-cpu@sha256:... registry.example/latentloom-gpu@sha256:...

as `docker inspect --format '{{index .RepoDigests 0}}' IMAGE` says them after a push. Others stay as they are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "kuberay" / "components" / "images" / "kustomization.yaml"
_REFERENCE = re.compile(r"((?:[\w.:-]+/)*([\w.-]+))@(sha256:[0-9a-f]{64})")


def pinned(text: str, reference: str) -> str:
    """The file's text with one image at its digest; ValueError for what is no such image."""
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise ValueError(f"{reference!r} is not REGISTRY/NAME@sha256:DIGEST")
    where, name, digest = found.groups()
    line = f"  - {{name: {name}, newName: {where}, digest: {digest}}}"
    text, count = re.subn(rf"^  - \{{name: {re.escape(name)}, .*\}}$", line, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{FILE} has no image {name}")
    return text


def main() -> int:
    """All of them, or none and exit code 2."""
    text = FILE.read_text()
    try:
        for reference in sys.argv[1:]:
            text = pinned(text, reference)
    except ValueError as error:
        sys.stderr.write(f"{error}\nexit code 2\n")
        return 2
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
