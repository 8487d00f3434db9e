"""Samples of a dataset by id: shards on disk, copies of remote ones, several datasets as one."""
