"""A dataset as a reader sees it: the state of one moment, its live rows and their row groups.

    Dataset.open --state--> visible files, dead rows --row_groups--> live ones --> columns, straight from pages

`pins` keeps a state for a training that goes on for weeks, and what its ranks map of it; `dataset` also reads what
rows name beside the Parquet files. A file that is lost or damaged is an input error that names it
(`row_groups.reading_table`). Nothing here writes but pins.
"""
