"""Stable names of rows."""

from __future__ import annotations

import hashlib


def sample_id(source_name: str, key: str, variant: int = 0) -> bytes:
    """16 bytes that name a row for ever: blake2b-128 of source name, key, and the variant where there are several."""
    text = f"{source_name}\0{key}" + (f"\0variant {variant}" if variant else "")
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
