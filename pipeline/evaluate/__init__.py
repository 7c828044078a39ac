"""Evaluation: what the codec loses, what the model's samples are worth, and a report a person can read.

    plan of the latents, else a listing  --read, decode policy-->  reference images, images_NHWC uint8
    reference images  --fit-->  classifier (real images only)
    reference images  --codec there and back-->  pairs  --sums-->  PSNR, SSIM, LPIPS, accuracy of reconstructions
    reference, samples  --feature network-->  features_ND  --sums, bottom-k-->  Frechet, KID, precision/recall
    samples  --classifier-->  predicted class  --against the request-->  accuracy with a Wilson interval
    all of it  -->  evaluation.json, report.html, classifier.safetensors under `output.uri`

Images pass in batches by workers, those of a cluster or this process, and are never held together; what stays is sums
that merge by addition and a bounded, order-independent choice of feature vectors. A worker that dies costs the piece
that it had, and no figure depends on who has looked at what. The rows of the latents' own source are known by their
plan: what has another version now gives no image, and is counted.

Every figure carries its contract: how many images, which resize, which feature network by hash, which sampler. That
network is given as a file or by name, or it is the classifier fitted here on the real images; distances in the
latter's space compare runs of one data set and nothing else, and are not the Inception figures of the literature.
`fid: published` is: the figure `fid` is there with the weights of the published Inception alone, known by their hash.
CLIP and LPIPS are used where their weights are given.

The classifier and the reference's feature sums are kept under a key made of the reference's digest and their
settings, unless images of it have gone, and evaluations of other samples against the same reference reuse them.
`evaluation.json` is written last: a run that dies before leaves files that the next run writes again, and a run whose
inputs (by digest) and configuration were evaluated already returns the recorded figures without loading anything.
"""
