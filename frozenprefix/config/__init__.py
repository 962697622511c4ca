"""Recipes: reading YAML, checking it against typed sections, and overrides.

Example:
    >>> load_recipe(recipe_path, ["seed=1"]).seed
    1
"""

from frozenprefix.config.contrastive import ContrastiveRecipe
from frozenprefix.config.loading import load_checkpoint_recipe, load_recipe, recipe_from_dict
from frozenprefix.config.precision import inference_precision, resolve_precision
from frozenprefix.config.recipe import Recipe
from frozenprefix.config.yaml import read_yaml, write_yaml

__all__ = [
    "ContrastiveRecipe",
    "Recipe",
    "inference_precision",
    "load_checkpoint_recipe",
    "load_recipe",
    "read_yaml",
    "recipe_from_dict",
    "resolve_precision",
    "write_yaml",
]
