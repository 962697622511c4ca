"""Without a private name of torch or transformers the plain path gives the same numbers, and the log says so once."""

from __future__ import annotations

import ast
import logging

import pytest
import torch

from frozenprefix.kernels import (
    attention_for_rows,
    compat,
    llama_layer,
    prepackable_dtypes,
    prepacked_frozen_weights,
)
from tests.helpers import ROOT
from tests.kernels.test_llama_layer import assert_alike, random_lm, read_rows

pytestmark = pytest.mark.skipif(not prepackable_dtypes(), reason="PyTorch has no oneDNN here")

PREPACKING = ("_linear_pointwise", "_reorder_linear_weight")
HOOKS = ("_forward_hooks", "_global_forward_pre_hooks", "_backward_hooks", "_global_backward_pre_hooks")
ATTENTION = ("_attn_implementation", "_attn_implementation_internal")


@pytest.fixture
def hide(monkeypatch):
    """`hide("_name")` lets `compat.private` miss this name, as after an update of the library."""

    def hide(*names: str) -> None:
        own = getattr
        monkeypatch.setattr(
            compat,
            "getattr",
            lambda owner, name, *rest: None if name in names else own(owner, name, *rest),
            raising=False,
        )
        compat.say_once.cache_clear()

    yield hide
    compat.say_once.cache_clear()


@pytest.mark.parametrize("name", [*PREPACKING, *HOOKS, *ATTENTION, "_softmax_backward_data"])
def test_without_a_private_name_the_numbers_are_the_same(name, hide, caplog):
    lm = random_lm("llama")
    expected = read_rows(lm)
    hide(name)
    with caplog.at_level(logging.WARNING, logger="frozenprefix"):
        for _ in range(2):
            with prepacked_frozen_weights(lm):
                assert_alike(read_rows(lm), expected)
    assert caplog.text.count(f"this release has no '{name}'") == 1


@pytest.mark.parametrize("name", PREPACKING)
def test_without_its_operators_nothing_is_prepacked(name, hide):
    hide(name)
    lm = random_lm("llama")
    assert prepackable_dtypes() == ()
    with prepacked_frozen_weights(lm):
        assert not any("forward" in vars(module) for module in lm.modules())


def test_without_knowledge_of_bfloat16_only_float32_is_prepacked(hide):
    hide("_is_mkldnn_bf16_supported")
    assert prepackable_dtypes() == (torch.float32,)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_cannot_be_seen_are_taken_to_be_there(name, hide):
    assert not compat.has_hooks(torch.nn.Linear(2, 2))
    hide(name)
    assert compat.has_hooks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ATTENTION)
def test_an_attention_that_cannot_be_switched_stays(name, hide):
    lm = random_lm("llama")
    before = lm.config._attn_implementation
    hide(name)
    with attention_for_rows(lm):
        assert lm.config._attn_implementation == before


def change_norm(layer, monkeypatch):
    """As if a release computed the norm another way under the same names."""
    own = llama_layer._norm
    monkeypatch.setattr(llama_layer, "_norm", lambda x, norm: (own(x, norm)[0] * 1.01, own(x, norm)[1]))


def change_signature(layer, monkeypatch):
    own = layer.forward
    monkeypatch.setattr(
        type(layer), "forward", lambda self, states, masks, **kwargs: own(states, attention_mask=masks, **kwargs)
    )


@pytest.mark.parametrize(
    ("change", "message"), [(change_norm, "differs from that of"), (change_signature, "failed on")]
)
def test_a_layer_that_a_release_changes_keeps_its_own_forward(change, message, monkeypatch, caplog):
    lm = random_lm("llama")
    change(lm.model.layers[0], monkeypatch)
    with caplog.at_level(logging.WARNING, logger="frozenprefix"), prepacked_frozen_weights(lm):
        assert not any("forward" in vars(layer) for layer in lm.model.layers)
        up = lm.model.layers[0].mlp.up_proj
        assert not up.forward.copied_elsewhere, "its products are prepacked one by one"
    assert message in caplog.text


@pytest.mark.parametrize("code", ["lm._hidden", 'getattr(lm, "_hidden", None)', 'hasattr(lm, "_hidden")'])
def test_a_private_name_is_seen(code):
    assert _private_attributes(ast.parse(code)) == ["_hidden"]


def test_no_other_package_uses_a_private_name_of_a_library():
    """Names that start with an underscore belong to this package, or to an object of its own."""
    package = ROOT / "frozenprefix"
    trees = {path: ast.parse(path.read_text()) for path in package.rglob("*.py")}
    own = {"_asdict", "_replace", "_fields", "_exit"}.union(*map(_defined, trees.values()))  # public all the same
    found = []
    for path, tree in trees.items():
        if path.parent != package / "kernels":
            found += [f"{path}: {name}" for name in _private_attributes(tree) if name not in own]
    assert not found


def _defined(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            names.add(node.attr)
    return names


def _private_attributes(tree: ast.AST) -> list[str]:
    """Names in `owner._name` and `getattr(owner, "_name")`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_own(node.value):
            names.append(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names += [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
    return [name for name in names if name.startswith("_") and not name.startswith("__")]


def _is_own(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls", "ctx")
