"""Presets: small files of values, meant to be copied. Each defines `preset()` -> Preset(projector, base, chat)."""
