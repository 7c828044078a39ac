"""The one door to every store: a local directory or a bucket, with the same promises on each.

    URI --root--> Root   list, read, read of a listed version, put, put if absent, delete; retries where they are safe

root     what everybody uses; a creation is made once, whoever repeats it, and a lost answer is resolved; keys that
         lead out of a root are refused
stores   a disk: names linked in place, synced with their directories; and what fsspec opens: S3 and GCS in their own
         words, stores without conditional writes refused
stored   documents read back: JSON becomes a typed value, or an error that names file and field
trust    what a received thing may make us do: places that are followed, sizes, the files that a library sees; of
         safetensors their heads and small tensors
web      servers that nobody here runs: how much is read, for how long, and where a request may lead
errors   what a store's exception means for a job

A write is whole or not there. Knows configuration and errors, and nothing above.
"""
