"""Rows to files to one commit: schema, shards of single-bucket row groups, the committer.

Files are named by their content and their generation, and put before the record that names them: a crash in between
leaves orphans, which garbage collection removes after its grace.
"""
