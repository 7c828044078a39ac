"""Latents by label, counted by DuckDB out of the Parquet files: python read_with_duckdb.py URI."""

import sys

import duckdb
import latentloom as ll

latents = ll.open_latents(sys.argv[1])
parts = [
    f"SELECT * FROM read_parquet('{file.uri}')" + (f" WHERE {file.row_filter}" if file.row_filter else "")
    for file in latents.files()
]
rows = duckdb.sql(" UNION ALL BY NAME ".join(parts))
print(duckdb.sql("SELECT label, count(*) FROM rows GROUP BY label ORDER BY label").fetchall())
