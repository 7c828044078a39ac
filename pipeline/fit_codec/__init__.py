"""Fitting a small VAE to a source of images: a plain torch job.

    source --images--> chosen pictures uint8 [n, h, w, 3] --fit--> weights, PSNR --job--> a codec directory

The output is claimed first and `fit_codec.complete.json` is written last: a crash in between leaves a directory
without that marker, which the same command fits again and any other refuses to touch. Fitting is a function of its
configuration, so the second attempt writes what the first would have.
"""
