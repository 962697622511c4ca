"""The names that examples in docstrings use without defining them."""

from __future__ import annotations

from tests.helpers.doctest import ExampleNames, SharedValues


def test_every_name_has_a_value(tmp_path):
    """
    Example:
        >>> [path.name for path in (recipe_path, image_path, images_folder, lm_folder, checkpoint, tmp_path)][:3]
        ['recipe.yaml', 'red_circle.png', 'images']
        >>> len(list(captioner.caption([image_path]))), model.training, processor.prefix_length, recipe.name
        (1, False, 2, 'tiny')
        >>> torch.ones(2).sum().item(), np.ones(2).shape, image.size, (data_folder / "qa.jsonl").exists()
        (2.0, (2,), (48, 48), True)
    """
    used = test_every_name_has_a_value.__doc__ or ""
    assert all(f"{name}" in used for name in ExampleNames.NAMES)


def test_nothing_is_built_before_it_is_named(tmp_path):
    names = ExampleNames(SharedValues(tmp_path / "shared"), tmp_path)
    assert names.recipe is not None
    assert not (tmp_path / "shared" / "checkpoint").exists()
