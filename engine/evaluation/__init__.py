"""Scores of a network on a data set, and the files that hold them."""
