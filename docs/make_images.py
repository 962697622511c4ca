"""The images of tasks.md: outputs of trained models for drawings under a free licence.

    python docs/make_images.py runs/quickstart/best --photos runs/flickr8k/best --search runs/lit_flickr8k/best \
        --retrieval runs/retrieval/best --dialog runs/dialog/best --video runs/video/best --clips data/clips

The drawings are easy-VQA's (MIT licence) and Twitter's emoji (graphics CC-BY 4.0), fetched from PyPI and npm. A
checkpoint that is not given leaves its image as it is. Every word in the images that a model wrote is shown as it
wrote it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from sheet import BLUE, GAP, GREY, LINE, MARGIN, RED, SIDE, Sheet, draw_prompt

from frozenprefix import Captioner
from frozenprefix.data import Sample, load_image, load_source
from frozenprefix.data.caption_retriever import image_keys
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.evaluation.tasks import binding_episodes
from frozenprefix.inference import Clip, Dialog, Embedder, ImageIndex, VideoCaptioner, choose_answers
from frozenprefix.models import IMAGE_TOKEN

IMAGES = Path(__file__).with_name("images")
EASY_VQA = "pypi://easy-vqa==1.0/easy_vqa/data"
EMOJI = "data/emoji_easy"  # python recipes/emoji.py data/emoji_easy --classes easy
SHOWN_TO_PHOTO_MODEL = ("bicycle", "sailboat", "dog", "slice of pizza")
QUERIES = ("a dog", "people riding a bike", "a boat on the water", "a red flower")


# ── one image each ──


def captions(captioner: Captioner, photos: Path | None, drawings: Sequence[Sample], emoji: Sequence[Sample]) -> None:
    """Captions of drawings by a model trained on drawings, and of emoji by a model trained on photos."""
    sheet = Sheet()
    sheet.title("trained on drawings (recipes/quickstart.yaml)")
    paths = [sample.images[0] for sample in drawings]
    for number, caption in enumerate(captioner.caption(paths)):
        x, y = MARGIN + number % 4 * 190, 36 + number // 4 * (SIDE + 40)
        sheet.image(caption.path, x, y)
        sheet.text(caption.text, x, y + SIDE + 18, ink=BLUE)
    if photos is not None:
        y, shown = sheet.height + 36, [sample.images[0] for sample in emoji]
        sheet.text(
            "trained on photos (recipes/flickr8k.yaml), without drawings",
            MARGIN,
            y,
            bold=True,
            mono=False,
        )
        for number, caption in enumerate(Captioner.from_pretrained(photos).caption(shown)):
            top = y + 14 + number * (SIDE + 8)
            sheet.image(caption.path, MARGIN, top)
            sheet.text(caption.text, MARGIN + SIDE + GAP, top + 38, ink=BLUE)
    sheet.save(IMAGES / "caption.svg")


def answers(captioner: Captioner, questions: Sequence[Sample]) -> None:
    """Questions about drawings with the model's answers, and the right answer where it differs."""
    sheet = Sheet()
    by_image: dict[Path, list[Sample]] = {}
    for sample in questions:
        by_image.setdefault(sample.images[0], []).append(sample)
    for number, (path, asked) in enumerate(by_image.items()):
        y = MARGIN + number * (4 * LINE + 24)
        sheet.image(path, MARGIN, y + 8)
        for row, sample in enumerate(asked):
            base = y + 18 + row * LINE
            answer = captioner.answer(path, sample.question or "")
            x = sheet.text(sample.question or "", MARGIN + SIDE + GAP, base)
            right = answer == sample.targets[0]
            x = sheet.text(answer, x + 12, base, ink=BLUE if right else RED, bold=True)
            if not right:
                sheet.text(f"(right: {sample.targets[0]})", x + 12, base, ink=GREY)
    sheet.save(IMAGES / "vqa.svg")


def classes(checkpoint: Path) -> None:
    """The confusion matrix that `frozenprefix evaluate --task classification` draws."""
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate_checkpoint(
            checkpoint,
            task="classification",
            data=EASY_VQA,
            split="test",
            limit=150,
            templates=["Caption: a"],
            predictions=Path(folder) / "predictions.jsonl",
            feature_cache="off",
        )
        IMAGES.mkdir(exist_ok=True)
        (IMAGES / "classification.svg").write_bytes(Path(result["confusion"]["file"]).read_bytes())


def search(checkpoint: Path, emoji: Sequence[Sample]) -> None:
    """The first five emoji for each query."""
    embedder = Embedder.from_pretrained(checkpoint)
    index = ImageIndex.build(embedder, [sample.images[0] for sample in emoji])
    sheet = Sheet()
    for row, (query, hits) in enumerate(zip(QUERIES, index.search(embedder.embed_texts(QUERIES)), strict=True)):
        y = MARGIN + row * (SIDE + 30)
        sheet.text(query, MARGIN, y + 38, bold=True)
        for column, hit in enumerate(hits):
            x = MARGIN + 190 + column * (SIDE + GAP)
            sheet.image(hit.path, x, y)
            sheet.text(f"{hit.score:.2f}", x + 16, y + SIDE + 16, ink=GREY)
    sheet.save(IMAGES / "search.svg")


def retrieval_augmented(checkpoint: Path, drawings: Sequence[Sample]) -> None:
    """Prompts with captions of similar images, and the captions that the model continues them with."""
    captioner = Captioner.from_pretrained(checkpoint)
    if captioner.retriever is None:
        raise SystemExit(f"{checkpoint} was trained without data.retrieval")
    sheet = Sheet()
    for number, sample in enumerate(drawings):
        path = sample.images[0]
        pixel_values = captioner.processor.image_processor(load_image(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = captioner.model.encode(pixel_values).float()
        keys = image_keys(captioner.model.vision_encoder, [path])
        prompt = captioner.retriever.prompts([captioner.processor.prompt_for("caption")], features, keys)[0]
        caption = captioner.generate([prompt], image_features=features, num_beams=5, max_new_tokens=10)[0].text
        draw_prompt(sheet, prompt, [path], MARGIN + number * 250, MARGIN, answer=caption)
    sheet.save(IMAGES / "retrieval_augmented.svg")


def few_shot(captioner: Captioner, emoji: Sequence[Sample]) -> None:
    """One episode: two made-up names are bound to classes, then a new image is to be named."""
    episode = binding_episodes(emoji, ways=2, shots=1, episodes=8, seed=1)[3]
    prompt = episode.prompt.replace(IMAGE_TOKEN, f"\n{IMAGE_TOKEN}")
    sheet = Sheet()
    sheet.title("what the language model reads; an image takes the place of prefix_length tokens")
    y = draw_prompt(sheet, prompt, episode.images, MARGIN, 32)
    chosen = choose_answers(captioner, [episode])[0]
    sheet.text(f"choices: {', '.join(episode.choices)}", MARGIN, y + 18)
    x = sheet.text(f"right: {episode.answer}", MARGIN, y + 18 + LINE)
    sheet.text(f"this model chose: {chosen}", x + 24, y + 18 + LINE, ink=BLUE if chosen == episode.answer else RED)
    sheet.save(IMAGES / "few_shot.svg")


def dialog(checkpoint: Path, drawings: Sequence[Sample]) -> None:
    """Five turns in the chat template of the language model, with real replies."""
    talk = Dialog.from_pretrained(checkpoint)
    first, second = (sample.images[0] for sample in drawings)
    talk.ask("what shape is in the image?", [first], max_new_tokens=12)
    talk.ask("what color is it?", max_new_tokens=12)
    talk.ask("and what shape is in this image?", [second], max_new_tokens=12)
    talk.ask("what color is it?", max_new_tokens=12)
    talk.ask("what color was in the first image?", max_new_tokens=12)
    text = talk.processor.apply_chat_template(talk.messages)
    sheet = Sheet()
    sheet.title("the conversation in the language model's own chat template")
    shown, y = iter((first, second)), 32.0
    speaker = ""
    for line in text.rstrip("\n").split("\n"):
        speaker = line.removeprefix("<|im_start|>") if line.startswith("<|im_start|>") else speaker
        written = speaker == "assistant" and not line.startswith("<|im_start|>")
        for part in textwrap.wrap(line, 90) or [""]:
            marks = [next(shown) for _ in range(part.count(IMAGE_TOKEN))]
            if written:
                sheet.text(part, MARGIN, y + 15, ink=BLUE, bold=True)
                y += LINE
            else:
                y = draw_prompt(sheet, part, marks, MARGIN, y)
    sheet.save(IMAGES / "dialog.svg")


def video(captioner: Captioner, drawings: Sequence[Sample]) -> None:
    """A clip of three drawings: every second is captioned, and equal neighbours are joined."""
    images = [load_image(sample.images[0]) for sample in drawings]
    with tempfile.TemporaryDirectory() as folder:
        clip = write_clip(Path(folder) / "clip.mp4", images, seconds=(2.0, 1.0, 3.0))
        # to the scene detector, a small shape on the same background is no new scene
        segments = VideoCaptioner(captioner, frames=6).summary(clip, sampler="uniform")
        frames = Clip(clip)
        middles = [frames.index_at((segment.start + segment.end) / 2) for segment in segments]
        shown = [frame.image for frame in frames.at(middles)]
    sheet, scale = Sheet(), 150.0
    for segment, image in zip(segments, shown, strict=True):
        x = MARGIN + segment.start * scale
        sheet.image(image, x, MARGIN)
        sheet.line(x, MARGIN + SIDE + 12, MARGIN + segment.end * scale - 4)
        sheet.text(f"{segment.start:.1f} to {segment.end:.1f} s", x, MARGIN + SIDE + 30, ink=GREY)
        sheet.text(segment.caption, x, MARGIN + SIDE + 50, ink=BLUE)
    sheet.save(IMAGES / "video.svg")


def moving(checkpoint: Path, clips: Path) -> None:
    """Clips of moving drawings, the frames that the model reads, and its captions."""
    captioner = VideoCaptioner(Captioner.from_pretrained(checkpoint), frames=4, pooling="frames")
    sheet, y = Sheet(), float(MARGIN)
    for path in sorted(clips.glob("val_*.mp4"))[:4]:
        clip = Clip(path)
        for place in range(4):
            frame = clip.at([clip.index_at((place + 0.5) * clip.duration / 4)])[0]
            sheet.image(frame.image, MARGIN + place * (SIDE + GAP), y)
        sheet.text(captioner.caption(path).text, MARGIN + 4 * (SIDE + GAP) + GAP, y + SIDE / 2, ink=BLUE)
        y += SIDE + GAP
    sheet.save(IMAGES / "video_moving.svg")


def write_clip(path: Path, images: Sequence[Image.Image], seconds: Sequence[float], rate: int = 10) -> Path:
    """A video that shows each image for some seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = images[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for image, length in zip(images, seconds, strict=True):
            for _ in range(round(length * rate)):
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def main(
    checkpoint: Path,
    photos: Path | None,
    search_with: Path | None,
    retrieval: Path | None,
    dialog_with: Path | None,
    video_with: Path | None,
    clips: Path,
    only: list[str],
) -> None:
    source = {"type": "easy_vqa", "path": EASY_VQA, "split": "test", "captions": True, "limit": 60}
    samples = load_source(source)
    drawings = [sample for sample in samples if sample.task == "caption"]
    random.Random(2).shuffle(drawings)
    asked = [q for d in drawings[8:11] for q in [s for s in samples if s.task == "vqa" and s.images == d.images][:4]]
    emoji = load_source({"type": "captions", "path": EMOJI})
    known = [next(s for s in emoji if s.metadata["name"] == name) for name in SHOWN_TO_PHOTO_MODEL]
    captioner = Captioner.from_pretrained(checkpoint)
    images: dict[str, Callable[[], None]] = {
        "caption": lambda: captions(captioner, photos, drawings[:8], known),
        "vqa": lambda: answers(captioner, asked),
        "classification": lambda: classes(checkpoint),
        "few_shot": lambda: few_shot(captioner, emoji),
        "video": lambda: video(captioner, drawings[11:14]),
    }
    if search_with is not None:
        images["search"] = lambda: search(search_with, emoji)
    if retrieval is not None:
        images["retrieval_augmented"] = lambda: retrieval_augmented(retrieval, drawings[14:17])
    if dialog_with is not None:
        images["dialog"] = lambda: dialog(dialog_with, drawings[:2])
    if video_with is not None:
        images["moving"] = lambda: moving(video_with, clips)
    for name in only or images:
        images[name]()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the images of tasks.md.")
    parser.add_argument("checkpoint", type=Path, help="of recipes/quickstart.yaml")
    parser.add_argument("--photos", type=Path, help="checkpoint of recipes/flickr8k.yaml")
    parser.add_argument("--search", type=Path, dest="search_with", help="checkpoint of recipes/lit_flickr8k.yaml")
    parser.add_argument("--retrieval", type=Path, help="checkpoint that was trained with data.retrieval")
    parser.add_argument("--dialog", type=Path, dest="dialog_with", help="checkpoint of recipes/dialog.yaml")
    parser.add_argument("--video", type=Path, dest="video_with", help="checkpoint of recipes/video.yaml")
    parser.add_argument(
        "--clips", type=Path, default=Path("data/clips"), help="the output of recipes/drawings.py video"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="images to draw, such as vqa")
    main(**vars(parser.parse_args()))
