"""The limit: the same decoding and the same VAE with no pipeline at all; the latents are thrown away.

`python -m ... IMAGES CODEC RESOLUTION BATCH PROCESSES [keep]`: each process takes its share of the files and of the
cores; with `keep` it keeps freed memory, as the product's encoders do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.dataflow.cluster import CPU_WORKER_ENV


def work(paths: list[Path], codec_path: str, resolution: int, batch: int, threads: int, ready: Any) -> None:
    """Decode and encode some files; waits for the others after loading."""
    import numpy as np
    import torch

    from pipeline.codec.codec import load_codec
    from pipeline.source.config import ImageConfig
    from pipeline.source.pixels.prepare import Reject, prepare
    from pipeline.source.reading.rows import SourceRow

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = load_codec(codec_path, device=device, dtype="auto")
    image = ImageConfig(resolution=resolution, multiple_of=8)

    def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        found = prepare(SourceRow(0, path.name, path.read_bytes(), None, None, None), image)
        return None if isinstance(found, Reject) else found[0].pixels

    ready.wait()
    # Beside a GPU the next images are decoded meanwhile; on the cores that encode, threads would only get in the way.
    with ThreadPoolExecutor(2) as pool:
        waiting: list[Any] = []
        for found in pool.map(pixels, paths) if device == "cuda" else map(pixels, paths):
            waiting += [] if found is None else [found]
            if len(waiting) == batch:
                codec.encode(torch.from_numpy(np.stack(waiting)).to(device)).cpu()
                waiting = []
        if waiting:
            codec.encode(torch.from_numpy(np.stack(waiting)).to(device)).cpu()


def main() -> None:
    folder, codec = sys.argv[1:3]
    resolution, batch, processes = (int(a) for a in sys.argv[3:6])
    if "keep" in sys.argv[6:]:
        os.environ.update(CPU_WORKER_ENV)
    paths = sorted(Path(folder).iterdir())
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes + 1)
    workers = [
        context.Process(target=work, args=(paths[i::processes], codec, resolution, batch, threads, ready))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    print(json.dumps({"images": len(paths), "work_s": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
