"""What a device gives: encode, train and sample with the product's own classes, each beside a bare loop.

    python -m tests.benchmarks.gpu [--device auto|cuda|cpu] [--quick] [--areas encode,train,sample]
                                   [--compile auto|off|on|both] [--out DIR]

To be run wherever a GPU is at hand, from the root of a checkout; it needs torch, numpy, pyarrow, pillow, fsspec and
diffusers, and nothing else (no Ray, no MLflow, no installation of this project). Weights are random, nothing is
downloaded. The JSON is written anew after every figure: a run that is cut short keeps what it has. Where a command
may not last long, take one area at a time; compiling is a large part of the time (`--compile off`).

    encode   Encoder and codec from uint8 pixels on the host to packed latents on the host, in batches that overlap
             with the copies; the limit is the same VAE called on a tensor that is on the device already
    train    the training loop from batches in memory to updated weights: objective, keyed noise and times, guard,
             clip, EMA, fused AdamW; and forward and backward of the model alone, against diffusers' of the same size
    sample   Denoiser and Decoder, one after the other in this process, from a table of requests to a table of pixels;
             the limit is a plain Euler loop with guidance over the same modules, and the pixels back on the host

A figure is the median of rounds after a warm-up; sides that are compared take turns; the clock is read when the
device has done its work. Shares of the peak are of a large matmul measured in the same run and, for devices whose
data sheet pipeline/train/loop.py knows, of that, too. The device-busy share is the time in which at least one kernel
ran (by the profiler, copies left out, in one more round) over the median time of a round without the profiler. A
batch that does not fit the memory is halved, and a note says so.

Without CUDA no figure of a full-size network is taken: the networks are reduced and named so. `--quick` takes tiny
ones on any device, to see that everything runs.
"""
