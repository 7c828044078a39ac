"""From a URI to rows of compressed bytes: listing, and one reader for each kind of source.

    SourceConfig --list_entries--> Entry ... --(the plan makes units of them)--> read_unit --> SourceRow | EndOfUnit

listing    entries in one strict order (key, row), the same on local disks and object stores; and a unit's rows, any
           sub-ranges of them: those of `folder`, `webdataset`, `parquet`, and of plug-ins
folder     files, metadata files and texts beside them; webdataset: samples out of `tar` archives
manifest   listings that somebody else made: manifests, S3 Inventories, the logs of Delta and Iceberg tables
parquet    Parquet files, in a child that asks for their bytes; parquet_file: what is inside one; text_file: CSV and
           JSON Lines, in the same child
filters    which rows to keep, the same expression over tables and over single records
fields     captions, labels and further fields out of what stands beside images
rows       what is listed, what is handed on, and its stable names

What is read is the version that was listed; another one gives no row, and stays a gap.
"""
