#!/usr/bin/env python3
"""Copy networks of others (text encoder, judges) from the store to a folder: jobs read them from a disk, never a hub.

Run as an init container of the pods that compute with them. Arguments, both optional: where they lie (a path or URI;
default $LATENTLOOM_STORE/networks) and the folder. A store that does not answer ends it with an error, and the pod
with it, for another try. One that answers and has none, or refuses, does not: the job, which knows what it needs,
then ends with exit code 3 and names it, where an init container would only fail over and over.
"""

from __future__ import annotations

import os
import sys

import fsspec


def main() -> int:
    """0 when every file that there is lies in the folder."""
    source = sys.argv[1] if len(sys.argv) > 1 else f"{os.environ['LATENTLOOM_STORE'].rstrip('/')}/networks"
    folder = sys.argv[2] if len(sys.argv) > 2 else "/var/lib/latentloom/networks"
    store, path = fsspec.core.url_to_fs(source)
    try:
        files = store.find(path)
    except (FileNotFoundError, PermissionError) as error:
        sys.stderr.write(f"{source} is not to be read: {error}\n")
        return 0
    if not files:
        sys.stderr.write(f"There is no file below {source}: put the text encoder and the judges there.\n")
        return 0
    # Each by its own name: what copying a whole folder means differs between stores.
    targets = [os.path.join(folder, os.path.relpath(name, path)) for name in files]
    for target in targets:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    store.get(files, targets)
    sys.stdout.write(f"{len(files)} files from {source}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
