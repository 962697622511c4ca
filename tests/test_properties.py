"""Properties that hold for any input: orders of images, tries and their rows, and what is written and read again."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frozenprefix.config import read_yaml, write_yaml
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_writer import FeatureCacheWriter
from frozenprefix.data.samplers import BlockOrder, ShuffledOrder
from frozenprefix.data.sources import load_source
from frozenprefix.models.packing.division import fill_rows
from frozenprefix.models.packing.trie import Target, Trie, build_trie
from frozenprefix.utils import read_jsonl, write_jsonl
from frozenprefix.utils.tensors import load_tensors, save_tensors

# Derandomized: a failure is the same on every machine, and no data base of examples is kept.
few = settings(
    max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
number = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)
value = st.recursive(
    st.none() | st.booleans() | number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)

# ── orders ──


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 30), st.integers(0, 2**31))
def test_every_epoch_of_shards_has_every_image_once(sizes, block, seed):
    order, total = BlockOrder(sizes, block, seed), sum(sizes)
    epochs = [[order.at(epoch * total + place) for place in range(total)] for epoch in range(2)]
    for number, images in enumerate(epochs):
        assert {epoch for epoch, _ in images} == {number}
        assert sorted(image for _, image in images) == list(range(total))


@few
@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_a_place_does_not_depend_on_what_was_asked_before(images, block, seed, random):
    places = list(range(3 * images))
    for make in (lambda: ShuffledOrder(images, seed), lambda: BlockOrder([1] * images, block, seed)):
        expected = [make().at(place) for place in places]
        order, mixed = make(), random.sample(places, len(places))
        found = {place: order.at(place) for place in mixed}
        assert [found[place] for place in places] == expected


# ── tries ──

IMAGE = 9
targets = st.lists(
    st.builds(
        lambda context, learned, weight: Target([IMAGE, *context, *learned], 1 + len(context), weight),
        st.lists(st.integers(0, 2), max_size=3),
        st.lists(st.integers(0, 2), min_size=1, max_size=5),
        st.sampled_from([1.0, 0.5, 2.0]),
    ),
    min_size=1,
    max_size=6,
)


def path_to(trie: Trie, node: int) -> list[int]:
    """Token ids of the ancestors of a node and its own: node j is an ancestor exactly if j <= node < end[j]."""
    return [trie.ids[above] for above in range(node + 1) if trie.end[above] > node]


@few
@given(targets, st.booleans())
def test_a_trie_learns_every_token_of_every_target_after_its_own_text(listed, share):
    trie = build_trie(listed, IMAGE, share=share)
    expected: Counter[tuple[int, ...]] = Counter()
    for target in listed:
        for place in range(target.num_context, len(target.input_ids)):
            expected[tuple(target.input_ids[: place + 1])] += target.weight
    found: Counter[tuple[int, ...]] = Counter()
    for (node, token), weight in trie.edges.items():
        found[(*path_to(trie, node), token)] += weight
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[text], expected[text]) for text in expected)
    assert trie.depth == [len(path_to(trie, node)) - 1 for node in range(len(trie))]


@few
@given(targets)
def test_sharing_never_adds_nodes(listed):
    assert len(build_trie(listed, IMAGE)) <= len(build_trie(listed, IMAGE, share=False))


@few
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.none() | st.integers(0, 100))
def test_every_trie_is_in_one_row(lengths, budget):
    rows = fill_rows(lengths, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    if budget is not None:
        assert all(sum(lengths[index] for index in row) <= budget or len(row) == 1 for row in rows)


# ── written and read again ──


@few
@given(st.dictionaries(text.filter(bool), value, max_size=5))
def test_yaml(values):
    assert read_yaml(write_yaml(values), "values") == values


@few
@given(rows=st.lists(value, max_size=6))
def test_json_lines(tmp_path, rows):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [row for _, row in read_jsonl(tmp_path / "rows.jsonl")] == rows


@few
@given(
    shapes=st.dictionaries(text.filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 4), max_size=3)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
)
def test_tensors(tmp_path, shapes, dtype):
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, shape in shapes.items()}
    save_tensors(tensors, tmp_path / "x.safetensors")
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == dtype for name, tensor in tensors.items())


@few
@given(keys=st.lists(st.text("abcdef0123456789", min_size=1, max_size=9), unique=True, min_size=1, max_size=9))
def test_the_feature_cache(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("cache")
    features = np.random.default_rng(len(keys)).standard_normal((len(keys), 2, 3)).astype(np.float32)
    with FeatureCacheWriter(folder, {"encoder": "x"}) as writer:
        writer.add(keys, features)
    stored = FeatureCache.open(folder, {"encoder": "x"}).get(keys)
    assert np.allclose(np.asarray(stored), features, atol=2e-3)


@few
@given(captions=st.lists(st.lists(text.map(str.strip).filter(bool), min_size=1, max_size=3), min_size=1, max_size=4))
def test_captions(tmp_path, captions):
    rows = [{"image": "a.png", "captions": texts, "id": str(number)} for number, texts in enumerate(captions)]
    write_jsonl(tmp_path / "captions.jsonl", rows)
    samples = load_source({"type": "captions", "path": str(tmp_path)}, images=False)
    assert [list(sample.targets) for sample in samples] == captions
