"""From a latent dataset to an endless, reproducible sequence of batches.

    rows         --data-->     those that are served      a side of the split, a condition on stored columns
    row groups   --order-->    epochs, lanes, windows     pure arithmetic on (seed, epoch, position)
    windows      --reader-->   parts of row groups, mixed [n, 2*c*h*w] stored bytes, on threads
    windows      --text----->  and their captions' embeddings, as stored, where text is learned from
    rows         --loader-->   batches                    [b, c, h, w] as stored, ids, labels, captions, sizes
    streams      --mixture-->  one stream                 whole batches of several datasets, by weight

A latent is copied once, from its file's pages to its batch (twice where its window ends with the batch): nothing is
decoded, checked (unless `verify`) or widened to float32 on the way, which is the device's work.

The global batch is cut into `lanes`; a lane owns fixed tracks of every bucket's rows, all over the dataset, and
gives the same share of every batch. A window is a part of each of its tracks, hundreds of 256 KiB or more, so that
data which lie class by class are mixed, too; fewer of 4 MiB do where a shuffled compaction has mixed the rows.
Batches of few classes are warned of. Ranks serve neighbouring lanes, so the ranks' shares, put together in rank
order, are the same global batches whatever the number of ranks, and each rank reads its parts only. A run goes on by
the rule that it began with, which its state names (`order`).

One epoch gives every row at most once. Per bucket, the rows left over from whole global batches (fewer than
one batch) are left out, other ones in each epoch; a bucket smaller than one batch is never served, and is
named in `left_out` and in a warning.

Nothing is ever written to the dataset and there is no state but the step number: a crash leaves nothing,
and a stream started at step n gives what the first one would have given from there, after re-reading at
most the one window per lane and bucket that the step falls in. Memory holds at most two windows per lane
and bucket, together `window_bytes` over all ranks and datasets, besides the ids, labels and captions of row groups in
use (256 MiB a rank at most), what is just being read and the batches already prepared; and of text what its reader
may hold ahead (see `text.dataset`).
"""
