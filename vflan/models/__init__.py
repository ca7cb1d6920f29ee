"""The network and nothing else: its three parts, adapters, quantisation, file formats and loss.

Comes in: the names of a recipe's backbones. Goes out: a LLaVA model and its processor. A new
language model is added here, and no other room needs to change.
"""
