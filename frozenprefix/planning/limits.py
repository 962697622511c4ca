"""Which recipes can be planned."""

from __future__ import annotations

from frozenprefix.config import ContrastiveRecipe, Recipe
from frozenprefix.errors import ConfigError

OTHER_OBJECTIVES = ("contrastive", "distillation", "self_critical")


def plannable_recipe(recipe: Recipe | ContrastiveRecipe) -> Recipe:
    """Return the recipe if the cost of all its parts is known.

    Raises:
        ConfigError: with one line for every part whose cost is not known.

    Example:
        >>> plannable_recipe(recipe) is recipe
        True
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"kind: got '{recipe.kind}', expected 'prefix': `plan` knows only the cost of training a mapper"
        )
    encoder, key, problems = recipe.model.vision_encoder, "model.vision_encoder", []
    if encoder.source == "features":
        problems.append(f"{key}.source: got 'features'; `plan` needs an encoder that reads images")
    if encoder.trainable != "none":
        problems.append(f"{key}.trainable: got {encoder.trainable!r}; `plan` needs a frozen encoder")
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
