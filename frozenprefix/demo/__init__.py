"""A page in the browser: captions, questions, chats, explanations and corrections. The logic needs no browser."""

from frozenprefix.demo.corrections import Correction, Corrections
from frozenprefix.demo.inputs import Item, read_items
from frozenprefix.demo.retraining import Retraining, correction_recipe
from frozenprefix.demo.server import serve
from frozenprefix.demo.session import Session
from frozenprefix.demo.studio import DemoModel, Studio

__all__ = [
    "Correction",
    "Corrections",
    "DemoModel",
    "Item",
    "Retraining",
    "Session",
    "Studio",
    "correction_recipe",
    "read_items",
    "serve",
]
