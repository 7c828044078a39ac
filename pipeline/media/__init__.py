"""Pictures for people: images to bytes and back, contact sheets, galleries, charts and their common style.

Functions of what they are given: nothing here reads or writes a store.
"""
