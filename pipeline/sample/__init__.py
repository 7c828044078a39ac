"""Requests in, images out: every image once, and every image possible to make again.

    grid or file  --requests-->  validated rows      label or prompt, seed, [h, w], steps, guidance
    requests      --plan-->      units               (unit, row) each; a unit has one shape and one schedule
    prompts       --embed-->     [l, d] states       once per distinct prompt, by one actor that all denoisers ask
    units         --denoise-->   raw [c, h/f, w/f]   in padded batches of one size; noise keyed by request id
    latents       --decode-->    uint8 [h, w, 3]     by the codec the model was trained on
    images        --write-->     fragments, commits  PNG/JPEG/WebP bytes with their provenance inside: in rows,
                                                     in files, or in one tar a unit

The model is an export, a training checkpoint with one of its averages, or a plain diffusers pipeline directory.

A request is known by the hash of its content, never by its place in a list: adding requests to a file costs
the added ones only, and the same request drawn by another actor, in another batch or on another day starts from
the same noise. The plan is frozen in the output root, so a unit means the same rows in every later run.

The ledger is the encode job's: a fragment is named by its content, a commit record created only if absent
makes it visible. A job killed at any moment leaves visible fragments that are whole, and others that nothing
refers to; the same command draws what is missing. Latents that are not finite and images the codec or the
image encoder refuses become rejects with a reason, counted with the images.

Afterwards a contact sheet and a gallery that needs no network are made from a bounded, fixed choice of images.
`regenerate` reads the provenance out of one image and makes that image again.
"""
