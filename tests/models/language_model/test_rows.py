"""Rows of one text each, for LMs that read no tries."""

from __future__ import annotations

import pytest
import torch
import transformers

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError
from frozenprefix.training.setup import build_model
from tests.helpers.data import pack_samples
from tests.helpers.lm import make_tokenizer


@pytest.mark.parametrize("family", ["bloom", "mpt", "mistral"])
def test_plain_batches_train_lms_that_read_no_tries(tiny_recipe, tmp_path, family):
    """ALiBi takes its positions from the mask; the text of the third is longer than its sliding window."""
    configs = {
        "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
        "mpt": lambda: transformers.MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
        "mistral": lambda: transformers.MistralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            sliding_window=4,
        ),
    }  # fmt: skip
    config = configs[family]()
    config.update({"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, processor = build_model(tiny_recipe(tmp_path / "run", "training.packing=none", lm=tmp_path))
    samples = [Sample("a", (), ("a red dog", "the man sits on grass"), prompt="<image> shape")]
    collator, pixels = Collator(processor), torch.randn(1, 3, 32, 32)
    total = tokens = 0.0
    for text in samples[0].targets:
        target = collator.target(samples[0], text)
        ids = torch.tensor([target.input_ids])
        labels = ids.clone()
        labels[:, : target.num_context] = -100
        learned = int((labels != -100).sum())
        total += model(input_ids=ids, labels=labels, pixel_values=pixels).loss.item() * learned
        tokens += learned
    plain = model(packed=pack_samples(collator, samples, packing="none"), pixel_values=pixels)
    assert plain.loss.item() == pytest.approx(total / tokens, rel=1e-5)
    with pytest.raises(ConfigError, match=r"training\.packing: .*set training\.packing=none"):
        model(packed=pack_samples(collator, samples), pixel_values=pixels)
