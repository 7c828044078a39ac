"""Images in: from whatever people call an image dataset to uint8 pixels of a bucket's size.

    SourceConfig --list--> Entry ... --(the plan makes units of them)--> read_unit --> SourceRow --prepare--> Prepared
       folder | manifest   key, size, etag, rows                          compressed bytes,      uint8 [h, w, 3],
       webdataset | parquet                                               caption, label         bucket, crop, ids

reading    listing, and a unit's rows of compressed bytes: folder, manifest, WebDataset tars, Parquet
pixels     bytes to pixels under limits, in children where decoders may be slow or crash; buckets; DECODE.md
reasons    the closed list of reasons; config: what is read, and how

Every row ends as pixels, as rejected(reason) or as filtered(reason); no bytes, however hostile, raise or hang.
Nothing here writes, so a crash leaves nothing behind: the same call gives the same rows again.
"""
