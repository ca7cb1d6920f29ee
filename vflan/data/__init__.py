"""What a model learns from: samples with their images, conversations as tokens and labels.

In: a LLaVA json with its images. Out: a table of samples, and the ids and labels of a conversation.
A new data source or mixture is one new file here. A change of the prompt (conversation.py) changes
what evaluation asks, too.
"""
