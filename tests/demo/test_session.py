"""What a user of the page sees, without a browser."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from frozenprefix.demo import DemoModel, Session, Studio, read_items, studio
from frozenprefix.demo.markup import explained, note, table, view
from frozenprefix.demo.studio import display_name
from frozenprefix.errors import ConfigError
from frozenprefix.inference import Captioner
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.training import train


def test_captions_grow_word_by_word_and_equal_those_of_the_captioner(session, demo_model, photo, shapes):
    other = shapes / "images" / "blue_cross.png"
    assert session.add([photo, other]) == []
    texts = [text for (text,) in session.caption_all(max_new_tokens=8)]
    whole = [c.text.strip() for c in demo_model.captioner.caption([photo, other], num_beams=1, max_new_tokens=8)]
    assert [session.captions[path, 0] for path in (photo, other)] == whole
    lengths = [len(text) for text in texts[: texts.index(whole[0]) + 1]]
    assert lengths == sorted(lengths)
    assert [caption for _, caption in session.gallery()] == whole


def test_the_one_that_is_looked_at_comes_first(session, photo, shapes):
    session.add([photo, shapes / "images" / "blue_cross.png"])
    session.choose(1)
    next(session.caption_all(max_new_tokens=2))
    assert [path.name for path, _ in session.captions] == ["blue_cross.png"]
    session.choose(7)
    assert session.item.name == "blue_cross.png"


def test_other_files_end_the_captions_of_those_before(session, photo, shapes):
    session.add([photo, shapes / "images" / "blue_cross.png"])
    writing = session.caption_all(max_new_tokens=30)
    next(writing)
    session.add([shapes / "images" / "green_square.png"])
    assert list(writing) == []
    assert not session.studio.models[0].lock.locked()
    list(session.caption_all(max_new_tokens=2))
    assert [path.name for path, _ in session.captions] == ["red_circle.png", "green_square.png"]


def test_beams_write_at_once(session, demo_model, photo):
    session.add([photo])
    texts = list(session.caption_all(beams=3, max_new_tokens=6))
    (whole,) = demo_model.captioner.caption([photo], num_beams=3, max_new_tokens=6)
    assert texts == [[whole.text.strip() or "(nothing)"]]


def test_two_checkpoints_side_by_side(session, demo_model, run_checkpoint, photo):
    captioner = Captioner.from_pretrained(run_checkpoint, device="cpu", precision="fp32")
    session.studio.models.append(DemoModel(run_checkpoint.parent / "last", captioner))
    first, second = session.studio.names
    assert first == run_checkpoint.parent.name
    assert second == f"{first}, last"
    session.add([photo])
    assert {len(texts) for texts in session.caption_all(max_new_tokens=3)} == {2}
    assert session.texts()[0] == session.texts()[1]
    session.studio.models[1] = DemoModel(run_checkpoint, captioner)
    assert session.studio.names == [f"{first} (1)", f"{first} (2)"]


def test_questions_and_chat(session, photo):
    with pytest.raises(ConfigError, match="Drop a photo or a clip first"):
        next(session.ask("what is it?"))
    session.add([photo])
    with pytest.raises(ConfigError, match="Write a question first"):
        next(session.ask("  "))
    (answer,) = list(session.ask("what color is it?"))[-1]
    assert answer
    *_, messages = session.chat(0, "what is it?", max_new_tokens=5)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "[red_circle.png] what is it?"
    *_, messages = session.chat(0, "and now?", max_new_tokens=5)
    assert messages[2]["content"] == "and now?", "the photo is known already"
    session.reset_chat(0)
    assert session.messages(0) == []


def test_a_checkpoint_that_cannot_chat_says_why(tiny_recipe, tiny_lm, session, tmp_path, photo):
    best = train(tiny_recipe(tmp_path / "t5", "training.max_steps=1", "training.packing=none", lm=tiny_lm("t5"))).best
    session.studio.models[0] = DemoModel(best, Captioner.from_pretrained(best, device="cpu"))
    session.add([photo])
    with pytest.raises(ConfigError, match=r"t5 cannot chat: .* needs a decoder-only language model"):
        next(session.chat(0, "what is it?"))
    assert list(session.caption_all(max_new_tokens=3))[-1][0]


def test_two_users_at_once(session, photo, shapes):
    """Both get what they would get alone, though one model writes for both."""
    studio, paths = session.studio, [photo, shapes / "images" / "blue_cross.png"]
    alone = {}
    for path in paths:
        session.add([path])
        alone[path] = list(session.caption_all(max_new_tokens=6))[-1]
    results: dict = {}

    def use(path) -> None:
        user = Session(studio)
        user.add([path])
        results[path] = list(user.caption_all(max_new_tokens=6))[-1]

    threads = [threading.Thread(target=use, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert results == alone


def test_a_user_who_leaves_in_the_middle_does_not_hold_the_model(session, photo):
    session.add([photo])
    writing = session.caption_all(max_new_tokens=30)
    next(writing)
    assert session.studio.models[0].lock.locked()
    closing = threading.Thread(target=writing.close)  # a server closes it in another thread
    closing.start()
    closing.join(timeout=60)
    assert not session.studio.models[0].lock.locked()


def test_an_explanation_has_a_button_for_each_word(session, photo):
    session.add([photo])
    with pytest.raises(ConfigError, match="no caption to explain"):
        session.explain(0)
    session.captions[photo, 0] = "a <red> circle"
    page = session.explain(0)
    assert page.count("<button") == page.count("fp-map") >= 3
    assert "&lt;" in page
    assert "<red>" not in page


def test_weak_occlusion_stays_dark(session, photo):
    """As on the page of `explain`: what is noise is not shown in full colour."""
    explanation = session.studio.models[0].explain(read_items([photo])[0][0], "a red circle")
    weak = explained(replace(explanation, occlusion=np.full_like(explanation.occlusion, 0.1)))
    strong = explained(replace(explanation, occlusion=np.full_like(explanation.occlusion, 5.0)))
    assert weak != strong


def test_evidence_leaves_out_images_that_cannot_be_read(session, photo, monkeypatch, tmp_path, shapes):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    there = [shapes / "images" / f"{name}.png" for name in ("blue_cross", "green_square")]
    monkeypatch.setattr(studio, "recipe_images", lambda checkpoint: [tmp_path / "broken.jpg", *there])
    model = DemoModel(session.studio.models[0].checkpoint, session.studio.models[0].captioner)
    assert model.explain(read_items([photo])[0][0], "a red circle").others == 2


def test_other_weights_may_have_another_encoder(session, photo, run_checkpoint):
    """What is trained may hold the encoder, so no features are kept."""
    model = session.studio.models[0]
    session.add([photo])
    list(session.caption_all(max_new_tokens=2))
    encoded = []
    handle = model.captioner.model.vision_encoder.register_forward_hook(lambda *_: encoded.append(1))
    list(session.caption_all(max_new_tokens=2))
    assert not encoded, "features are kept"
    model.use_weights(run_checkpoint)
    list(session.caption_all(max_new_tokens=2))
    handle.remove()
    assert encoded


def test_corrections_of_what_is_looked_at(session, photo):
    session.add([photo])
    session.captions[photo, 0] = "a dog"
    assert session.correct(0, "a red circle").startswith("Kept; 1 correction in ")
    assert "a red circle" in session.corrections_table()


def test_training_on_corrections_shows_before_and_after_and_can_go_back(session, photo):
    model = session.studio.models[0]
    weights = lambda: hash_tensors(model.captioner.model.trainable_state())  # noqa: E731
    before = weights()
    session.add([photo])
    list(session.caption_all(max_new_tokens=4))
    session.correct(0, "a red circle")
    *lines, (said, shown) = session.train(0, steps=5)
    assert any("step" in line for line, _ in lines)
    assert "Trained 5 steps on 1 correction, mixed with images of the first training. Validation loss" in said
    assert shown.count("<tr>") == 1 + 1 + 4, "the correction, and four images of the validation data"
    assert weights() != before
    assert session.go_back() == "The mapper is as it was."
    assert weights() == before
    with pytest.raises(ConfigError, match="no new mapper"):
        session.keep()


def test_no_text_becomes_markup():
    assert "<b>" not in note(["<b>"]) + table("<b>", ["<b>"], [["<b>"]])
    assert note([]) == ""
    assert "Nothing is chosen" in view(None)


@pytest.mark.parametrize(
    ("place", "name"),
    [("/runs/mlp/best", "mlp"), ("/runs/mlp/last", "mlp, last"), ("me/captions", "captions"), ("best", "best")],
)
def test_names(place, name):
    assert display_name(place) == name


def test_a_studio_stops_all_trainings(session):
    stopped = []
    studio = Studio(session.studio.models, session.studio.corrections)
    studio.trainings.append(type("Training", (), {"stop": lambda self: stopped.append(1)})())
    studio.stop()
    assert stopped == [1]
