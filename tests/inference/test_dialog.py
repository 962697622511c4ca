"""Dialogs: the cached history computes what the whole history does, templates, streaming, errors, and the terminal."""

from __future__ import annotations

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from frozenprefix.cli import chat
from frozenprefix.data.images import load_image
from frozenprefix.errors import BadImageError, ConfigError, DataError
from frozenprefix.inference import Captioner
from frozenprefix.inference.dialog import Dialog
from frozenprefix.kernels.compat import CACHE
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.setup import build_model
from tests.helpers.drawings import draw_shape
from tests.helpers.lm import save_tiny_lm

CHATML = (
    "{% for message in messages %}<s>{{ message['role'] + '\n' + message['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
RED, BLUE = draw_shape("red", "circle"), draw_shape("blue", "cross")
KINDS = {
    "prefix": [],
    "deep_prefix": ["model.fusion.type=deep_prefix"],
    "cross_attention": ["model.fusion.type=cross_attention", "model.fusion.every=1"],
    "residual": ["model.fusion.type=residual"],
    "prompt_tuning": ["model.language_model.peft.type=prompt_tuning", "model.language_model.peft.num_virtual_tokens=4"],
}
TURNS = [("what is it?", [RED]), ("<image>and <image>?", [BLUE, RED]), ("why?", [])]


@pytest.fixture(scope="module")
def made(tiny_recipe, tmp_path_factory):
    """`made("gpt2")` -> (model, processor) with an LM of that family whose words depend on all before them."""
    kept = {}

    def make(family: str = "llama", kind: str = "prefix"):
        if (family, kind) not in kept:
            folder = save_tiny_lm(tmp_path_factory.mktemp(family), family, sharpness=6.0)
            recipe = tiny_recipe(tmp_path_factory.mktemp("run"), *KINDS[kind], lm=folder)
            model, processor = build_model(recipe)
            torch.manual_seed(5)
            with torch.no_grad():
                for parameter in model.fusion.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            kept[family, kind] = model.eval(), processor
        return kept[family, kind]

    return make


@pytest.fixture
def dialog(made):
    """A dialog of the tiny LLaMA, without a chat template."""
    model, processor = made()
    processor.tokenizer.chat_template = None
    return Dialog(model, processor)


@pytest.fixture
def chatml(dialog):
    dialog.processor.tokenizer.chat_template = CHATML
    yield dialog
    dialog.processor.tokenizer.chat_template = None


# ── the history in the cache ──


def spy_on_lengths(patch, language_model) -> list[int]:
    """Tokens of each pass through the LM."""
    lengths, forward = [], language_model.forward

    def spy(*args, **inputs):
        given = inputs.get("inputs_embeds") if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
        lengths.append(given.shape[1])
        return forward(*args, **inputs)

    patch.setattr(language_model, "forward", spy)
    return lengths


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chatml"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [*[(family, "prefix") for family in ("gpt2", "llama", "gemma3")], *[("llama", kind) for kind in list(KINDS)[1:]]],
)
def test_cached_turns_are_the_whole_history(made, monkeypatch, family, kind, template):
    model, processor = made(family, kind)
    monkeypatch.setattr(processor.tokenizer, "chat_template", template)
    dialog, shown = Dialog(model, processor), []
    for number, (text, images) in enumerate(TURNS):
        shown += images
        messages = [*dialog.messages, {"role": "user", "content": text if "<image>" in text else "<image>" + text}]
        if not images:
            messages[-1]["content"] = text
        ids = dialog._encode(messages)
        before = dialog.num_tokens
        pixel_values = processor.image_processor(shown, return_tensors="pt")["pixel_values"]
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixel_values}
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": [2], "pad_token_id": 2}
        expected = model.generate(**inputs, **options)[0].tolist()
        with monkeypatch.context() as patch:
            read = spy_on_lengths(patch, model.language_model)
            dialog.ask(text, images, max_new_tokens=5)
        assert dialog._ids == ids + expected, f"turn {number}"
        if number:
            # the new tokens, and of the reply what its decoded text spells differently
            assert read[0] <= len(ids) - before + 6 < len(ids), "the history is read again"
    whole = torch.tensor([dialog._ids[: dialog._cache.get_seq_length()]])
    embeds, seen = model.fuse(whole, dialog._prefix_embeds)
    with torch.no_grad(), model.fusion.seeing(seen):
        cache = model.language_model(inputs_embeds=embeds, use_cache=True).get(CACHE)
    # a cache that the model makes itself may drop what lies before a sliding window
    for held, scratch in zip(dialog._cache.layers, cache.layers, strict=True):
        places = scratch.keys.shape[2]
        torch.testing.assert_close(held.keys[:, :, -places:], scratch.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(held.values[:, :, -places:], scratch.values, rtol=1e-4, atol=1e-4)


def test_earlier_images_reach_later_turns(dialog):
    """Without this the test above would prove little."""
    last = []
    for image in (RED, BLUE):
        dialog.reset()
        dialog.ask("what is it?", [image], max_new_tokens=1)
        dialog.messages[-1]["content"] = "dog"
        dialog.ask("why?", max_new_tokens=1)
        last.append(dialog._cache.layers[-1].keys[0, :, -1])
    assert not torch.allclose(*last, rtol=1e-2, atol=1e-2)


def test_a_reply_that_the_template_writes_differently_is_read_again(dialog):
    dialog.ask("what is it?", [RED], max_new_tokens=4)
    dialog.messages[-1]["content"] = "something else"
    dialog.ask("why?", max_new_tokens=4)
    cached = dialog._ids[-4:]
    fresh = Dialog(dialog.model, dialog.processor)
    fresh.messages, fresh._prefix_embeds = dialog.messages[:2], dialog._prefix_embeds
    fresh.ask("why?", max_new_tokens=4)
    assert fresh._ids[-4:] == cached


def test_reset_forgets_all_but_the_system_message(chatml):
    dialog = Dialog(chatml.model, chatml.processor, system="be brief")
    first = dialog.ask("what is it?", [RED], max_new_tokens=4)
    dialog.ask("why?", max_new_tokens=4)
    dialog.reset()
    assert (dialog.messages, dialog.num_tokens) == ([{"role": "system", "content": "be brief"}], 0)
    assert dialog.ask("what is it?", [RED], max_new_tokens=4) == first


def test_no_second_start_token(chatml):
    """The tokenizer writes <s>, and so does the template."""
    from tokenizers.processors import TemplateProcessing

    backend = chatml.processor.tokenizer._tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    try:
        assert chatml._encode([{"role": "user", "content": "a"}])[:2].count(1) == 1
        chatml.processor.tokenizer.chat_template = None
        assert chatml._encode([{"role": "user", "content": "a"}])[:2].count(1) == 1
    finally:
        backend.post_processor = TemplateProcessing(single="$A", special_tokens=[])


# ── templates ──


def test_without_a_template_the_trained_question_is_asked(dialog):
    conversation = [
        {"role": "user", "content": "<image>what is it?"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "<image>is <image> one too?"},
    ]
    text = dialog.processor.apply_chat_template(conversation)
    assert text == (
        "<image>Question: what is it? Answer: a dog\n<image>Question: is <image> one too? Answer:"
    )  # fmt: skip
    assert text.startswith(dialog.processor.prompt_for("vqa", "what is it?"))


def test_parts_of_messages_become_text_with_marks(chatml):
    parts = [{"type": "image", "image": RED}, {"type": "text", "text": "or "}, {"type": "image", "image": BLUE}]
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    processor = chatml.processor
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == "<s>system\ns</s>\n<s>user\n<image>or <image></s>\n<s>assistant\n"
    made = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    by_hand = processor(images=[RED, BLUE], text=text, return_tensors="pt")
    assert all(torch.equal(made[name], by_hand[name]) for name in ("input_ids", "attention_mask", "pixel_values"))


def test_batches_of_conversations(chatml):
    one = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "a dog?"}]}]
    two = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": BLUE}]}]
    made = chatml.processor.apply_chat_template([one, two], tokenize=True, return_dict=True, return_tensors="pt")
    by_hand = chatml.processor(images=[[RED], [BLUE]], text=["<s>user\n<image>a dog?</s>\n", "<s>user\na<image></s>\n"])
    assert made["pixel_values"].shape == (2, 3, 32, 32)
    rows = [row[mask.bool()].tolist() for row, mask in zip(made["input_ids"], made["attention_mask"], strict=True)]
    assert [row[-10:] for row in rows] == [
        [i for i, m in zip(row, mask, strict=True) if m][-10:]
        for row, mask in zip(by_hand["input_ids"], by_hand["attention_mask"], strict=True)
    ]


def test_other_parts_are_refused(chatml):
    from jinja2 import TemplateError

    conversation = [{"role": "user", "content": [{"type": "audio"}]}]
    with pytest.raises(TemplateError, match="got type 'audio', expected 'image' or 'text'"):
        chatml.processor.apply_chat_template(conversation)


def test_the_first_newline_of_a_template_stays(chatml):
    conversation = [{"role": "user", "content": "a"}]
    template = "\n{{ messages[0]['content'] }}"
    assert chatml.processor.apply_chat_template(conversation, template) == "\na"


def test_named_templates(chatml):
    tokenizer = chatml.processor.tokenizer
    tokenizer.chat_template = {"default": "d{{ messages | length }}", "tools": "t{{ messages | length }}"}
    conversation = [{"role": "user", "content": "a"}]
    assert chatml.processor.apply_chat_template(conversation) == "d1"
    assert chatml.processor.apply_chat_template(conversation, "tools") == "t1"
    with pytest.raises(ConfigError, match="chat_template: got 'tool', expected one of default, tools"):
        chatml.processor.apply_chat_template(conversation, "tool")


def test_a_template_of_the_processor_goes_before_and_is_saved(chatml, tmp_path):
    old = chatml.processor
    template = "own {{ messages[0]['content'] }}"
    processor = FrozenPrefixProcessor(old.image_processor, old.tokenizer, prefix_length=2, chat_template=template)
    processor.save_pretrained(tmp_path)
    conversation = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    for made in (processor, FrozenPrefixProcessor.from_pretrained(tmp_path)):
        assert made.apply_chat_template(conversation) == "own a"


# ── streaming and options ──


def test_pieces_are_the_reply(dialog):
    pieces = list(dialog.stream("what is it?", [RED], max_new_tokens=12))
    other = Dialog(dialog.model, dialog.processor)
    assert "".join(pieces).strip() == other.ask("what is it?", [RED], max_new_tokens=12)
    assert "".join(pieces).strip() == dialog.messages[-1]["content"]
    assert dialog._ids == other._ids


def test_a_closed_stream_ends_the_reply_and_keeps_what_was_written(dialog, monkeypatch):
    words = dialog.processor.tokenizer("dog dog dog dog dog dog dog dog dog dog")["input_ids"]
    taken = []

    def force(input_ids, scores):  # the LM writes these words
        taken.append(1)
        scores[:] = -1e9
        scores[:, words[len(taken) - 1]] = 0
        return scores

    pieces = dialog.stream("what is it?", [RED], max_new_tokens=len(words), logits_processor=[force])
    assert next(pieces)
    pieces.close()
    assert dialog.messages[-1]["role"] == "assistant"
    assert dialog.num_tokens == dialog._cache.get_seq_length() + 1, "history and cache fit together"
    assert dialog.ask("why?", max_new_tokens=2) is not None


def test_an_error_inside_the_stream_is_raised_and_the_dialog_goes_on(dialog):
    def fail(input_ids, scores):
        raise ZeroDivisionError("inside")

    before = dialog.ask("what is it?", [RED], max_new_tokens=3)
    with pytest.raises(ZeroDivisionError, match="inside"):
        list(dialog.stream("why?", max_new_tokens=3, logits_processor=[fail]))
    assert [message["content"] for message in dialog.messages] == ["<image>what is it?", before]
    reply = dialog.ask("why?", max_new_tokens=3)
    other = Dialog(dialog.model, dialog.processor)
    other.ask("what is it?", [RED], max_new_tokens=3)
    assert other.ask("why?", max_new_tokens=3) == reply


def test_sampling_options_reach_generate(dialog):
    replies = set()
    for seed in range(4):
        dialog.reset()
        torch.manual_seed(seed)
        replies.add(dialog.ask("what is it?", [RED], max_new_tokens=6, do_sample=True, temperature=5.0))
    assert len(replies) > 1


def test_a_mark_spelled_out_by_the_lm_asks_for_no_image(dialog, monkeypatch):
    monkeypatch.setattr(dialog.processor, "decode", lambda ids: "see <image>")
    assert dialog.ask("what?", max_new_tokens=2) == "see < image>"
    monkeypatch.undo()
    dialog.ask("why?", max_new_tokens=2)


# ── errors ──


def test_marks_and_images_must_match(dialog):
    with pytest.raises(DataError, match="message: got 2 <image> marks and 1 images"):
        dialog.stream("<image> or <image>?", [RED])
    with pytest.raises(DataError, match="got 1 <image> marks and 0 images"):
        dialog.stream("<image>?")


def test_the_context_of_the_lm(dialog):
    assert dialog.context == 128
    dialog.ask("what is it?", [RED], max_new_tokens=4)
    state = list(dialog.messages), dialog.num_tokens
    asked = len(dialog._encode([*dialog.messages, {"role": "user", "content": "why?"}]))
    message = (
        rf"dialog: {asked} tokens and a reply of up to 120 are more than the LM's context of 128; start again with "
        rf"reset\(\), or set max_new_tokens to {128 - asked} at most"
    )
    with pytest.raises(DataError, match=message):
        dialog.ask("why?", max_new_tokens=120)
    with pytest.raises(DataError, match=r"start again with reset\(\)$"):
        dialog.ask("why? " * 60, max_new_tokens=1)
    assert (dialog.messages, dialog.num_tokens) == state
    dialog.ask("why?", max_new_tokens=128 - asked)
    assert dialog.num_tokens <= 128


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"max_length": 9}, {"return_dict_in_generate": True}])
def test_options_of_several_rows_are_refused(dialog, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: not an option of a dialog"):
        dialog.ask("what?", **options)


def test_a_broken_image_leaves_the_history(dialog, tmp_path):
    with pytest.raises(BadImageError):
        dialog.ask("what?", [tmp_path / "no.png"])
    assert dialog.messages == []


# ── the terminal ──


@pytest.fixture
def talk(tiny_checkpoint):
    app = typer.Typer()
    app.command()(chat.command)

    def run(text: str, *arguments):
        result = CliRunner().invoke(app, [str(a) for a in (tiny_checkpoint, *arguments)], input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def image(tmp_path):
    RED.save(tmp_path / "red circle.png")
    return tmp_path / "red circle.png"


def test_chat(talk, image, tiny_checkpoint):
    lines = f"what is it?\n\n/image {image}\nand this?\n/reset\n/image {image}\nwhat is it?\n/quit\nnever\n"
    result = talk(lines, image, "--max-new-tokens", 5)
    assert result.exit_code == 0
    dialog = Dialog.from_pretrained(tiny_checkpoint, device="cpu")
    first = dialog.ask("what is it?", [load_image(image)], max_new_tokens=5)
    second = dialog.ask("and this?", [image], max_new_tokens=5)
    shown = [line.strip() for line in result.stdout.split("\n")]
    expected = [part.strip() for part in f"{first}\n{second}\n{first}\n".split("\n")]
    assert shown == expected


def test_chat_ends_with_its_input_and_goes_on_after_errors(talk, image, tmp_path):
    lines = f"/image {tmp_path / 'no.png'}\n/foto x\n{'why? ' * 99}\n/image {image}\nwhat is it?"
    result = talk(lines, "--max-new-tokens", 3, "--temperature", 0.7)
    assert result.exit_code == 0
    errors = result.stderr.splitlines()
    assert "no.png" in errors[0]
    assert errors[1].startswith("Error: got the command /foto; /image PATH adds an image")
    assert "more than the LM's context of 128" in errors[2]
    assert len(errors) == 3
    assert result.stdout.strip()


def test_chat_needs_its_images(talk):
    with pytest.raises(DataError, match=r"IMAGE: got 'none\.png', expected an image file that exists"):
        talk("", "none.png")


def test_images_may_be_of_any_mode(dialog):
    assert dialog.ask("what?", [Image.new("L", (9, 9))], max_new_tokens=2) is not None


def test_given_features_are_read_as_their_images_are(dialog):
    expected = [dialog.ask(text, images, max_new_tokens=4) for text, images in TURNS]
    features = Captioner(dialog.model, dialog.processor).encoder
    dialog.reset()
    given = [(text, features(images) if images else ()) for text, images in TURNS]
    assert [dialog.ask(text, images, max_new_tokens=4) for text, images in given] == expected
