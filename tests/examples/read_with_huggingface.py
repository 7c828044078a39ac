"""Latents as a Hugging Face dataset, row by row as they are asked for: python read_with_huggingface.py URI."""

import sys
from collections import Counter

import datasets
import latentloom as ll

latents = ll.open_latents(sys.argv[1])
rows = datasets.IterableDataset.from_generator(latents.__iter__)
print(sorted(Counter(row["label"] for row in rows).items()))
