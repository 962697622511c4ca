"""Which images and targets a step takes: pure functions of seed and step."""

from __future__ import annotations

from collections import Counter

from frozenprefix.data.samplers import ImageStream, choose_targets


def test_every_epoch_is_a_permutation_across_step_bounds():
    stream = ImageStream(7, 3, seed=0)
    pairs = [pair for step in range(7) for pair in stream.step(step)]  # 21 places: three epochs
    assert [epoch for epoch, _ in pairs] == [0] * 7 + [1] * 7 + [2] * 7
    epochs = [[image for e, image in pairs if e == epoch] for epoch in range(3)]
    assert all(sorted(images) == list(range(7)) for images in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_does_not_depend_on_what_was_asked_before():
    stream, fresh = ImageStream(10, 4, seed=5), [ImageStream(10, 4, seed=5) for _ in range(9)]
    backwards = [stream.step(step) for step in reversed(range(9))][::-1]
    assert backwards == [other.step(step) for step, other in enumerate(fresh)]


def test_the_seed_decides():
    steps = {tuple(ImageStream(20, 20, seed=seed).step(0)) for seed in range(5)}
    assert len(steps) == 5


def test_more_images_a_step_than_there_are():
    assert [epoch for epoch, _ in ImageStream(2, 5, seed=0).step(0)] == [0, 0, 1, 1, 2]


def test_targets_go_round_evenly():
    drawn = [choose_targets("abcde", 2, seed=1, image=3, epoch=epoch) for epoch in range(5)]
    assert Counter(letter for pair in drawn for letter in pair) == dict.fromkeys("abcde", 2)
    assert all(len(set(pair)) == 2 for pair in drawn)
    assert drawn == [choose_targets("abcde", 2, seed=1, image=3, epoch=epoch) for epoch in range(5)]


def test_images_start_their_round_differently():
    first = {tuple(choose_targets("abcde", 2, seed=1, image=image, epoch=0)) for image in range(30)}
    assert len(first) > 5


def test_all_targets_in_their_order():
    for count in (None, 3, 9):
        assert choose_targets("abc", count, seed=0, image=0, epoch=4) == ["a", "b", "c"]
