"""Captions of videos: of a clip, of its scenes, of a stream, their evaluation and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from frozenprefix.cli import video as command
from frozenprefix.data.samples import Sample
from frozenprefix.errors import BadImageError, ConfigError, DataError
from frozenprefix.evaluation import EvaluationOptions
from frozenprefix.evaluation.tasks.video import evaluate_video
from frozenprefix.inference import Captioner
from frozenprefix.inference.stream import StreamCaptioner, live_frames
from frozenprefix.inference.video import Clip, Segment, VideoCaptioner
from tests.helpers.drawings import COLOURS, SHAPES, draw_shape
from tests.helpers.video import av, colour_of, plain, three_colours, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def three(folder) -> Path:
    return three_colours(folder)


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint):
    return Captioner.from_pretrained(tiny_checkpoint, device="cpu", batch_size=4)


@pytest.fixture
def says_colours(captioner, monkeypatch):
    """A captioner that names the colour of what it is shown; the list gets its batches."""
    from frozenprefix.inference.captioner import Generation

    batches = []

    def generate(self, prompts, images=None, **options):
        batches.append((list(prompts), options))
        return [Generation(f"a {colour_of(image)} thing", -1.0) for image in images]

    monkeypatch.setattr(Captioner, "generate", generate)
    return captioner, batches


# ── captions ──


def test_a_clip_of_one_image_has_its_features(captioner, folder):
    """What goes through the codec is nearly the image; the mean of equal frames is one of them."""
    clip = write_clip(folder / "same.mkv", [draw_shape("red", "circle")], each=6, codec="ffv1")
    frame = next(Clip(clip).frames()).image
    pixel_values = captioner.processor.image_processor([frame], return_tensors="pt")["pixel_values"]
    expected = captioner.model.encode(pixel_values)
    pooled = VideoCaptioner(captioner, frames=4).features(clip)
    assert pooled.shape == expected.shape
    torch.testing.assert_close(pooled, expected)
    made = VideoCaptioner(captioner, frames=4).caption(clip, num_beams=2, max_new_tokens=5)
    by_hand = captioner.generate(["<image>"], [frame], num_beams=2, max_new_tokens=5)[0]
    assert made.text == by_hand.text
    assert made.score == pytest.approx(by_hand.score, abs=1e-3)


def test_pooled_and_one_after_the_other(captioner, three):
    each = VideoCaptioner(captioner, frames=3, pooling="frames")
    features = each.features(three)
    frames = [frame.image for frame in Clip(three).at([10, 30, 50])]
    assert [colour_of(frame) for frame in frames] == ["red", "green", "blue"]
    pixel_values = captioner.processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(features, captioner.model.encode(pixel_values))
    pooled = VideoCaptioner(captioner, frames=3).features(three)
    torch.testing.assert_close(pooled, features.mean(0, keepdim=True))
    made = each.caption(three, num_beams=1, max_new_tokens=5)
    by_hand = captioner.generate(["<image><image><image>"], frames, num_beams=1, max_new_tokens=5)[0]
    assert made == by_hand
    prompted = each.caption(three, prompt="<image> a <image> <image>", num_beams=1, max_new_tokens=5)
    assert prompted == captioner.generate(["<image> a <image> <image>"], frames, num_beams=1, max_new_tokens=5)[0]
    with pytest.raises(DataError, match="every <image> in the text needs one image"):
        each.caption(three, prompt="<image> a", num_beams=1)


def test_a_short_clip_gives_the_frames_it_has(captioner, folder):
    clip = write_clip(folder / "short.mp4", plain("red", "blue"), each=1)
    assert len(VideoCaptioner(captioner, frames=8, pooling="frames").features(clip)) == 2


def test_summary(says_colours, folder):
    captioner, batches = says_colours
    clip = write_clip(folder / "five.mp4", plain("red", "lime", "blue", "red", "darkred", "blue"), each=10)
    video = VideoCaptioner(captioner, frames=12)
    segments = video.summary(clip, num_beams=2)
    assert segments == [
        Segment(pytest.approx(start), pytest.approx(end), f"a {colour} thing")
        for start, end, colour in [(0, 1, "red"), (1, 2, "green"), (2, 3, "blue"), (3, 5, "red"), (5, 6, "blue")]
    ]
    assert [len(prompts) for prompts, _ in batches] == [4, 2], "in batches"
    assert batches[0] == (["<image>"] * 4, {"num_beams": 2, "max_new_tokens": 30})
    assert video.summary(clip, sampler="uniform") == segments, "12 parts of half a second, merged"


def test_wrong_options(captioner, three):
    with pytest.raises(ConfigError, match="got frames=0, pooling='mean'"):
        VideoCaptioner(captioner, frames=0)
    with pytest.raises(ConfigError, match="pooling='max'; expected at least 1, and 'mean' or 'frames'"):
        VideoCaptioner(captioner, pooling="max")
    with pytest.raises(ConfigError, match="sampler: got 'random', expected 'scenes' or 'uniform'"):
        VideoCaptioner(captioner).summary(three, sampler="random")


# ── streams ──


def test_follow(says_colours, three):
    captioner, batches = says_colours
    stream = StreamCaptioner(captioner)
    assert stream.latency() == {"frames": 0, "captioned": 0}
    made = list(stream.follow(three, prompt="it is"))
    assert [(caption.time, caption.caption) for caption in made] == [
        (pytest.approx(time), f"a {colour} thing") for time, colour in [(0, "red"), (2, "green"), (4, "blue")]
    ]
    assert batches == [(["<image>it is"], {"num_beams": 1, "max_new_tokens": 30})] * 3
    latency = stream.latency()
    assert (latency["frames"], latency["captioned"]) == (60, 3)
    assert 0 < latency["p50_ms"] <= latency["p95_ms"]
    assert latency["captioned_p50_ms"] == pytest.approx(sorted(caption.latency for caption in made)[1] * 1000)
    assert len(list(StreamCaptioner(captioner, cut=2, drift=2).follow(three))) == 1, "scene options"


def test_latency_percentiles(captioner):
    stream = StreamCaptioner(captioner)
    stream._latencies.extend((number / 1000, number > 90) for number in range(101))
    expected = {"frames": 101, "captioned": 10, "p50_ms": 50, "p95_ms": 95, "captioned_p50_ms": 95.5}
    assert {name: stream.latency()[name] for name in expected} == pytest.approx(expected)


def test_cameras_are_read_with_v4l2(monkeypatch, three):
    opened = []
    original = av.open

    def spy(source, **options):
        opened.append((source, options))
        return original(str(three))

    monkeypatch.setattr(av, "open", spy)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert len(list(live_frames("/dev/video0"))) == 60
    next(live_frames("rtsp://camera/1"))
    assert opened == [("/dev/video0", {"format": "v4l2"}), ("rtsp://camera/1", {})]


def test_a_camera_that_is_not_there():
    with pytest.raises(BadImageError, match="/dev/video97: no such file or device"):
        next(live_frames("/dev/video97"))


# ── evaluation ──


@pytest.fixture(scope="module")
def clips(folder) -> list[Sample]:
    """One clip for each colour, of its shapes; two samples of the first one."""
    samples = []
    for colour in COLOURS:
        path = write_clip(folder / f"{colour}.mp4", [draw_shape(colour, shape) for shape in SHAPES], each=3)
        samples.append(Sample(colour, (path,), (f"{colour} shapes", f"shapes in {colour}")))
    return [*samples, Sample("again", samples[0].images, ("red drawings",), prompt="the")]


@pytest.mark.parametrize("pooling", ["mean", "frames"])
def test_evaluation(captioner, clips, tmp_path, pooling):
    path = tmp_path / "predictions.jsonl"
    options = EvaluationOptions(path, num_beams=2, max_new_tokens=4, extra={"frames": 4, "pooling": pooling})
    result = evaluate_video(captioner, clips, options)
    assert (result["task"], result["n"], result["bad_images"]) == ("video", 4, {})
    assert result["settings"] == {"num_beams": 2, "max_new_tokens": 4, "frames": 4, "pooling": pooling}
    assert result["baselines"].keys() == {"blind", "shuffled"}
    assert result["baselines"]["blind"].keys() == result["metrics"].keys()
    assert all(math.isfinite(value) for value in result["metrics"].values())
    assert json.loads(json.dumps(result)) == result, "plain JSON"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["id"], row["images"]) for row in rows] == [(s.id, [str(s.images[0])]) for s in clips]
    video = VideoCaptioner(captioner, frames=4, pooling=pooling)
    generate = {"num_beams": 2, "max_new_tokens": 4}
    expected = [video.caption(s.images[0], prompt=s.prompt, **generate).text for s in clips]
    assert [row["model"] for row in rows] == expected
    # half of three clips further on, rounded down, is the next one
    others = [
        video.caption(clips[other].images[0], prompt=sample.prompt, **generate).text
        for sample, other in zip(clips, [1, 2, 0, 1], strict=True)
    ]
    assert [row["shuffled"] for row in rows] == others
    assert rows[0]["blind"] == rows[1]["blind"] == captioner.generate(["<image>"], **generate)[0].text


def test_bad_clips_are_counted(captioner, clips, tmp_path):
    bad = Sample("bad", (tmp_path / "no.mp4",), ("a thing",))
    options = EvaluationOptions(tmp_path / "p.jsonl", num_beams=1, max_new_tokens=2, max_bad_share=0.3)
    result = evaluate_video(captioner, [*clips, bad], options)
    assert (result["n"], result["bad_images"]) == (4, {"missing": 1})
    with pytest.raises(DataError, match="1 of 4 images are bad"):
        evaluate_video(captioner, [*clips, bad], EvaluationOptions(tmp_path / "q.jsonl"))


def test_evaluation_takes_captions_of_one_clip(captioner, clips, tmp_path):
    two = Sample("two", (clips[0].images[0],) * 2, ("a",))
    with pytest.raises(ConfigError, match="one video a sample; 1 samples differ, first two"):
        evaluate_video(captioner, [*clips, two], EvaluationOptions(tmp_path / "p.jsonl"))
    with pytest.raises(ConfigError, match="task 'video' has no option 'fps'"):
        evaluate_video(captioner, clips, EvaluationOptions(tmp_path / "p.jsonl", extra={"fps": 3}))


# ── command line ──


@pytest.fixture
def call(monkeypatch, captioner, tiny_checkpoint):
    monkeypatch.setattr(Captioner, "from_pretrained", lambda checkpoint, **options: captioner)
    app = typer.Typer()
    app.command()(command.command)

    def run(*arguments):
        result = CliRunner().invoke(app, [str(tiny_checkpoint), *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return run


def test_command_caption(call, captioner, three, tmp_path):
    out = tmp_path / "new" / "out.json"
    text = call(three, "--frames", 3, "--pooling", "frames", "--beams", 2, "--json", out).stdout
    expected = VideoCaptioner(captioner, frames=3, pooling="frames").caption(three, num_beams=2)
    assert text == expected.text + "\n"
    found = json.loads(out.read_text())
    assert found == {"video": str(three), "caption": expected.text, "score": pytest.approx(expected.score, abs=1e-4)}


def test_command_summary(call, says_colours, three, tmp_path):
    out = tmp_path / "out.json"
    assert call(three, "--summary", "--json", out).stdout == (
        "0.00\t2.00\ta red thing\n2.00\t4.00\ta green thing\n4.00\t6.00\ta blue thing\n"
    )
    first = json.loads(out.read_text())["segments"][0]
    assert first == {"start": 0, "end": pytest.approx(2), "caption": "a red thing"}
    assert says_colours[1][0][1]["num_beams"] == 5


def test_command_follow(call, says_colours, three, tmp_path):
    out = tmp_path / "out.json"
    result = call(three, "--follow", "--json", out)
    assert result.stdout == "0.00\ta red thing\n2.00\ta green thing\n4.00\ta blue thing\n"
    assert result.stderr.startswith("60 frames, 3 captioned; p50_ms ")
    found = json.loads(out.read_text())
    assert found["latency"]["frames"] == 60
    assert [caption["time"] for caption in found["captions"]] == pytest.approx([0, 2, 4])
    assert says_colours[1][0][1]["num_beams"] == 1


def test_command_errors(call, three):
    with pytest.raises(ConfigError, match="--summary and --follow exclude each other"):
        call(three, "--summary", "--follow")
    with pytest.raises(DataError, match=r"FILE: got 'none\.mp4'"):
        call("none.mp4")
