"""From a latent dataset to a trained, exported model: one readable loop, and the machinery that keeps it honest.

    weights --start------>  network, objective, scale, the weights   where model.init names some; what must stay does
    dataset --checks----->  facts: channels, classes, codec          refused before anything starts, naming both
    datasets --checks---->  one codec, one kind of condition         of several (data.mix), served by weight
    captions' embeddings --stream, task--> text [b, l, d], mask     the empty prompt for a keyed share (data.text)
    stream  --batches---->  latents, ids, labels, text on the device one ahead, pinned, on a stream of their own
    batches --task------->  x0, noise, t  [b, c, h, w], [b]          draws keyed by (seed, sample id, epoch)
    model   --loop------->  loss, one update per global batch        guard, clip, step, EMA; counted in images
    state   --checkpoint->  shards, receipts, COMPLETE.json          DCP safetensors and JSON, no pickle
    state   --hooks------>  fixed questions, fixed seeds             raw and averaged weights, any number of ranks
    reports --worker----->  history, quarantine, tracker             beside the step, before its checkpoint counts
    EMA     --export----->  <output>/model/<images>                  what sampling loads, written last; a whole
                                                                     diffusers pipeline where one is (`pipelines`)
    checkpoints --retention-> an export of an average of another length  a job of its own, after the run

`loop` (which also counts FLOPs), `task`, `state`, `checkpoint`, `hooks` know torch only. `worker` joins them to the
dataset, the stream and the tracker on one rank; `job` starts workers with Ray Train and watches them.

The store of `output.uri` is all that starts of a job share: `checkpoints/`, `history/`, `quarantine/`
(samples of skipped steps), `generations/` (the claims of its starts: see `runs`), `control/` (which of them should
stop, what ended one), `inputs/` (the states of the datasets it began with: see `pinned_inputs`), `grids/` and
`profiles/` where asked for, `done.json`.

A crash, of a worker, a node or the driver, leaves the checkpoints that have their marker. The next start, Ray's or
the same command's, takes the newest intact one, with its history, and repeats the steps in between:
on one kind of CPU in fp32 and the same number of ranks the final weights are bitwise those of an undisturbed run;
on another number they agree up to the order of float sums.
"""
