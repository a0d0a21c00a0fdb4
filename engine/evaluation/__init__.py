"""Evaluation of a network on a data set, and the files of its results."""
