"""The store: rows of latents (or of sampled images) in Parquet, made visible by an append-only ledger.

Flow of a write, with what a crash leaves at each arrow::

    claim a generation --> plan a version --> put fragment --> create commit record --> close the generation
         (nothing)           (a plan)         (an orphan file)   (visible, whole)        (a generation to take over)

A root holds `dataset.json` (identity and fingerprint), `plan/` (what must be done, frozen), `generations/`
(who may write, fenced), `ledger/` (what is done), `snapshots/` (bundles of older commit records), `data/` and
`rejects/` (Parquet that anybody can read). Only commit records make rows visible; a commit *landed*, *did not
land*, or is *unknown* until the record is read back. Rows are addressed by (unit, row); coverage is a set of
such addresses, so that a crash costs the gaps and nothing else. Files are named by their content.
ledger   who may write and what is done      plan   what is to be done      writer, read   rows to files, and back
maintain   verify, compact, dedup, forget; `withdrawn/` holds what was withdrawn, `verified/` how far proofs have come
The package knows neither ray nor torch. `FORMAT.md` is the specification.
"""
