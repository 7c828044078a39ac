"""Images in: from whatever people call an image dataset to uint8 pixels of a bucket's size.

    SourceConfig --list--> Entry ... --(the plan makes units of them)--> read_unit --> SourceRow --prepare--> Prepared
       uri                 key, size, etag, rows                          compressed bytes,      uint8 [h, w, 3],
       folder | webdataset | parquet                                      caption, label         bucket, crop, ids

listing    streams entries in one strict order (key, row), the same on local disks and object stores
readers    give a unit's rows, any sub-ranges of them: folder here, tar shards in webdataset, tables in parquet
decode     bytes to a loaded image under limits; color to sRGB; render to every resolution from one decode
isolate    the same in a child process with CPU and memory limits, for decoders that may be slow or crash
tables     what is inside one Parquet file; table_child runs it in a child that asks for its bytes (pipes serves both)
buckets    (height, width) to bucket and crop box: arithmetic only
prepare    a row to its variants or to one Reject; policy_fingerprint says all that decides pixels (DECODE.md)
reasons    the closed list of reasons; fields, metadata, patterns, uris serve the readers
filters    which rows to keep, the same expression over tables (filters) and over single records (record_filter)
synthetic  the shapes that the quickstart learns to draw

Every row ends as pixels, as rejected(reason) or as filtered(reason); no bytes, however hostile, raise or hang.
Nothing here writes except `synthetic`, so a crash leaves nothing behind: the same call gives the same rows again.
"""
