"""Latents by label, counted by Ray Data, whose tasks share the row groups: python read_with_ray.py URI."""

import sys

import latentloom as ll
import pyarrow as pa
import ray

PARTS = 4
latents = ll.open_latents(sys.argv[1])


def read(batch: pa.Table) -> pa.Table:
    return pa.concat_tables(latents.to_arrow(["label"], part=part, parts=PARTS) for part in batch["id"].to_pylist())


rows = ray.data.range(PARTS).map_batches(read, batch_size=1, batch_format="pyarrow")
counts = rows.groupby("label").count().to_pandas().sort_values("label")
print([(int(label), int(count)) for label, count in counts.itertuples(index=False)])
