"""The codec: both directions between pixels and latents.

    codec.path --files---> a Root of config.json + safetensors   (directory, fsspec URI, hub id at a revision)
               --info----> CodecInfo                             (no torch: class, hash, channels, factor, statistics)
               --load----> Codec                                 (weights on one device, ready)
    images uint8 [n,h,w,3] --encode--> raw latents float32 [n,c,h/f,w/f]   (2c channels for posterior=moments)
    raw latents            --decode--> images uint8 [n,h,w,3]

Latents are *raw*: no scale and no shift is ever applied here. The factors that a codec declares travel in
CodecInfo, and whoever trains or samples applies and inverts them. Pixels stay uint8 until they are on the
device, where they become [-1, 1].

`config`, `files` and `codec` import no torch until one is loaded, so a dry run and --help stay quick.
`diffusers_codec` is the implementation for diffusers' autoencoders; a third-party codec joins through the
entry point group `latentloom.codecs` (see `codec`).
"""
