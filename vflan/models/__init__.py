"""The network and nothing else: vision tower, projector and language model, their adapters and quantisation, the loss.

Comes in: a recipe's names of backbones. Goes out: a LLaVA model and its processor. A new language model is added here.
"""
