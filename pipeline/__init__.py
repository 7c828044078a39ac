"""Images to latents, latents to a trained diffusion model, the model to images.

The journey, with the shape at each arrow::

    source files   --source-->   uint8 RGB [h, w, 3], one bucket each      (compressed bytes travel, not pixels)
    uint8 RGB      --codec-->    raw latents [c, h/f, w/f]                 (VAE actors of the encode job)
    raw latents    --store-->    Parquet row groups of one bucket          (visible through commit records)
    row groups     --stream-->   batches [b, c, h, w] + ids, labels        (a pure function of seed and position)
    batches        --train-->    checkpoints, EMA tracks, an export        (Ray Train workers, torch-only loop)
    export         --sample-->   latents --codec--> images + provenance    (Ray Data job, same ledger as encoding)
    images         --evaluate--> figures with their contract, a report

Every arrow is one job, one MLflow run, and can be killed at any moment: run the same command again and it
goes on. Imports point one way: jobs -> encode, train, sample, evaluate -> everything else.
"""
