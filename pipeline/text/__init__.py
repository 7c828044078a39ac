"""Text embeddings: a column family beside the latents, one dataset for each encoder.

Captions stay text in the latent dataset. The job embed_text reads them (and nothing else of it) and adds, under
`<data.uri>/text/<encoder name>`, a dataset of kind "text" that shares no file with the latents::

    captions --hash, distinct--> plan --units--> tokens [b, L] --encoder--> [b, L, D] --true tokens--> commit
    (of every row)     (frozen captions)     (fixed shape)             (fixed shape)     [tokens, D]

A row is one distinct caption, addressed by the blake2b-128 of its UTF-8 bytes; the empty prompt is always one of
them. Padding is computed, for every batch has one shape (behind an instruction another one), and stored only where
it is part of the text (`encoders.padding` attended or shown), as published models read it. The plan holds the
captions themselves: a run that was killed goes on from the plan without reading the latents again, and loses at
most one unit. A later run plans only captions no version holds. Rows follow the order in which captions first occur
in the latents, so a stream that reads latents in windows finds the embeddings of a window close together.

`config` and `files` say which encoder it is (no torch), `encoder` is the door to transformers, `job` plans, and fills
the gaps of a plan; `dataset` says which captions are new, is the read side, with numpy and pyarrow only, and
says how several encoders become one text. A caption whose row is absent is an error of the reader, never a zero
vector.
"""
