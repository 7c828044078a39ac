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
goes on. `latentloom` is what other programs import; it stands beside the jobs. Imports point one way:
jobs -> {encode, train, fit_codec, sample, evaluate, text, lineage, maintenance} ->
{runs, dataflow, media} -> {codec, stream, model} -> diffusion -> {source, store} -> tracking -> storage -> {config,
errors}.

The words, as all modules use them:

    unit         the quantum of planning: some source objects, or a part of one; what a crash of a reader costs
    row          one source image; its address is (unit, row), for ever
    variant      one of several stored rows of one source row (mirrored, another resolution)
    bucket       height and width in pixels; a batch and a row group have one
    plan         what is to be done: frozen versions, each adding units and retiring rows
    run          one job at work on its output: a generation, and an MLflow run that its successor goes on with
    generation   who may write: numbered, claimed by one run, which fences off all older ones
    claim        a generation's first object; lists what is visible from before
    commit       one record, created only if absent, that makes files visible and rows settled
    fragment     a file of one commit; a shard: a full-size one that compaction wrote of several
    gap          planned rows that no visible commit has settled
    pass         one Ray Data execution over the gaps
    seal         records of one generation as one object beside them; a bundle: records that a later claim lists
    pin          a state of a dataset that a training keeps, so that it goes on with the rows it began with
    lane         one of the fixed number of sequences that the stream's order is dealt to; ranks share them out
    window       parts of row groups that are shuffled together
    start        one run of a training job; an attempt: one start of its workers by Ray
    rehearsal    a run whose processes reserve GPUs and compute on CPUs
"""
