"""Captions and answers from a trained model."""

from frozenprefix.inference.captioner import Caption, Captioner, Generation

__all__ = ["Caption", "Captioner", "Generation"]
