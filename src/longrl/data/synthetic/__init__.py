"""Synthetic long videos: stories drawn from a seed, painted, rendered to real mp4 files, and asked about.

world: what happens · paint: what it looks like · render: the file · questions: what is asked and the truth ·
dataset: files and questions on disk · gallery: a picture of it all.
"""
