"""Presets: small files of values, meant to be copied.

Each defines `preset()`, which returns Preset(projector, base, chat).
"""
