"""What a model learns from: samples and their images, conversations as tokens and labels, mixtures, checks and downloads.

Comes in: a LLaVA json with its images. Goes out: a table of samples, and (ids, labels) of one conversation. A new source
or mixture is one file here. What a prompt looks like (conversation.py) also decides what evaluation asks.
"""
