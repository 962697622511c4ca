"""The page about Python runs as it is written, from top to bottom, with a tiny model under the name of a large one."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from frozenprefix import FrozenPrefixForConditionalGeneration
from frozenprefix.registry import undoing_registrations
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def names(tiny_lm, tmp_path_factory):
    """What the blocks of the page define, after they have run in an empty folder."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(tiny_lm("llama"), folder / "HuggingFaceTB" / "SmolLM2-135M")
    defined = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch, undoing_registrations():
        patch.chdir(folder)
        patch.setenv("FROZENPREFIX_HOME", str(folder / "home"))
        torch.manual_seed(0)
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"docs/python.md, block {number + 1}", "exec"), defined)
        defined["loaded"] = FrozenPrefixForConditionalGeneration.from_pretrained("runs/colours/best")
        defined["tensors"] = load_file("runs/colours/best/model.safetensors")
        yield defined


def test_a_prefix_is_trained_by_a_language_model_of_transformers(names):
    lm, mapper, packed = names["lm"], names["mapper"], names["packed"]
    assert not any(parameter.requires_grad for parameter in lm.parameters())
    # the loss of packed rows is the mean over all learned tokens, as of the captions one by one
    features, fuse, image = names["image_features"], names["fuse"], names["image"]
    prefix, total = mapper(features), 0.0
    for number, texts in enumerate(names["ends"]):
        for ids in texts:
            tokens = torch.tensor([[image] * 4 + ids])
            embeds = fuse(lm.model, tokens, prefix[number : number + 1], image_token_id=image)
            logits = lm.model(inputs_embeds=embeds).logits[0, 3:-1]
            total += torch.nn.functional.cross_entropy(logits, tokens[0, 4:], reduction="sum").item()
    packed_loss = lm.loss(packed, fuse(lm, packed, prefix)).item() / packed.num_tokens
    assert packed_loss == pytest.approx(total / packed.num_tokens, rel=1e-5)
    assert len(names["texts"]) == 2


def test_the_mapper_and_the_encoder_of_the_page_are_in_its_checkpoint(names):
    assert type(names["loaded"].mapper.body) is names["GatedMapper"]
    assert type(names["loaded"].vision_encoder.network) is names["Colours"]
    assert names["tensors"].keys() == names["loaded"].trainable_state().keys()


def test_the_run_of_the_page_has_ended(names):
    assert names["result"].steps == 30
    assert names["from_table"]["type"] == names["from_others"]["type"] == "objects"
