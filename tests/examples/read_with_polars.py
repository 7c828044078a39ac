"""Latents by label, counted by Polars out of the Parquet files: python read_with_polars.py URI."""

import sys

import latentloom as ll
import polars as pl

latents = ll.open_latents(sys.argv[1])
rows = pl.concat(
    pl.scan_parquet(file.uri).filter(pl.sql_expr(file.row_filter)) if file.row_filter else pl.scan_parquet(file.uri)
    for file in latents.files()
)
print(rows.group_by("label").len().sort("label").collect().rows())
