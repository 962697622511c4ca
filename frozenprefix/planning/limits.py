"""What a plan can work out, and what it would leave out."""

from __future__ import annotations

from frozenprefix.config.base_recipe import BaseRecipe
from frozenprefix.config.recipe import Recipe
from frozenprefix.errors import ConfigError

OTHER_OBJECTIVES = ("contrastive", "distillation", "self_critical")


def known_recipe(recipe: BaseRecipe) -> Recipe:
    """The recipe, when a plan covers all of it.

    Raises:
        ConfigError: with one line for every part that the figures would leave out.
    """
    if not isinstance(recipe, Recipe):
        kind = getattr(recipe, "kind", type(recipe).__name__)
        raise ConfigError(f"kind: got '{kind}', expected 'prefix': `plan` knows the cost of training a mapper only")
    encoder, key, problems = recipe.model.vision_encoder, "model.vision_encoder", []
    if encoder.source == "features":
        problems.append(f"{key}.source: got 'features'; `plan` works out runs that encode their images")
    if encoder.trainable != "none":
        problems.append(f"{key}.trainable: got {encoder.trainable!r}; `plan` works out runs with a frozen encoder")
    if recipe.model.fusion.type != "prefix":
        problems.append(f"model.fusion.type: got '{recipe.model.fusion.type}'; `plan` knows the cost of 'prefix' only")
    further = {
        f"{key}.peft": encoder.peft,
        "model.language_model.peft": recipe.model.language_model.peft,
        "data.text_only": recipe.data.text_only,
        "data.retrieval": recipe.data.retrieval,
        **{f"objectives.{name}": getattr(recipe.objectives, name) for name in OTHER_OBJECTIVES},
    }
    problems += [
        f"{name}: got a block of keys, expected null: its cost is not known to `plan`; {name}=null plans the rest"
        for name, value in further.items()
        if value is not None
    ]
    if problems:
        raise ConfigError(problems)
    return recipe
