"""Distributed training of compact vision-language models that predict a number from an image and text."""

__version__ = "0.1.0"
