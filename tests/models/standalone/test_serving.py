"""`transformers serve` with a checkpoint's own code: chat completions and responses with images, whole and streamed."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image
from transformers import pipeline

openai = pytest.importorskip("openai", reason="the openai client is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed, which transformers serve needs")
pytest.importorskip("uvicorn", reason="uvicorn is not installed, which transformers serve needs")

# the command, in a process in which importing this package fails
SERVE = "import sys; sys.modules['frozenprefix'] = None; from transformers.cli.transformers import main; main()"
QUESTION = "what is this?"
PATIENCE = 120  # seconds until the server answers


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    from frozenprefix import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor

    folder = tmp_path_factory.mktemp("serve") / "model"
    model = FrozenPrefixForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.generation_config.eos_token_id = None  # six tokens in any case
    model.save_pretrained(folder, self_contained=True)
    FrozenPrefixProcessor.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Address and log of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--trust-remote-code"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", str(folder), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        _wait(process, port, log)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(process, port, log):
    for _ in range(PATIENCE * 2):
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server does not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server[0], api_key="none", max_retries=2, timeout=PATIENCE)


def data_url(image: Image.Image | bytes) -> str:
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def image(shapes):
    return Image.open(shapes / "images" / "red_circle.png")


def chat(client, folder, *images, stream=False):
    content = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return client.chat.completions.create(
        model=str(folder),
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],
        max_tokens=6,
        temperature=0,
        stream=stream,
    )


def respond(client, folder, image, stream=False):
    content = [{"type": "input_image", "image_url": image}, {"type": "input_text", "text": QUESTION}]
    return client.responses.create(
        model=str(folder), input=[{"role": "user", "content": content}], max_output_tokens=6, stream=stream
    )


@pytest.fixture(scope="module")
def expected(folder):
    """What the pipeline of the package writes about images."""
    pipe = pipeline("image-text-to-text", model=str(folder))

    def write(*images):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": QUESTION}]
        chat = [{"role": "user", "content": content}]
        return pipe(text=chat, generate_kwargs={"max_new_tokens": 6}, return_full_text=False)[0]["generated_text"]

    return write


def test_chat_completions_and_responses(client, server, folder, image, expected):
    text = expected(image)
    assert text
    assert chat(client, folder, data_url(image)).choices[0].message.content.strip() == text.strip()
    try:
        found = respond(client, folder, data_url(image)).output_text
    except openai.InternalServerError:
        if "validation error for InputTokensDetails" in server[1].read_text():
            pytest.skip("the types of this openai are newer than this transformers")
        raise
    assert found.strip() == text.strip()


def test_streams(client, folder, image, expected):
    text = expected(image)
    chunks = [
        part.choices[0].delta.content for part in chat(client, folder, data_url(image), stream=True) if part.choices
    ]
    assert len([chunk for chunk in chunks if chunk]) > 1
    assert "".join(filter(None, chunks)).strip() == text.strip()
    events = respond(client, folder, data_url(image), stream=True)
    found = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert found.strip() == text.strip()


@pytest.mark.parametrize("count", [0, 2])
def test_no_image_and_two(client, folder, image, expected, count):
    found = chat(client, folder, *[data_url(image)] * count).choices[0].message.content
    assert found.strip() == expected(*[image] * count).strip()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (lambda: data_url(b"no image"), "cannot be read as an image"),
        (lambda: "data:image/png;base64,%%%", "cannot be read as an image"),
        (lambda: data_url(Image.new("1", (9500, 9500))), "9500 x 9500 pixels, expected at most"),
    ],
    ids=["broken", "not base64", "enormous"],
)
def test_bad_images_are_an_error_of_that_request_alone(client, server, folder, image, expected, url, message):
    once = openai.OpenAI(base_url=server[0], api_key="none", max_retries=0, timeout=PATIENCE)
    with pytest.raises(openai.APIStatusError):
        chat(once, folder, url())
    for _ in range(50):  # the log follows the answer
        if message in server[1].read_text():
            break
        time.sleep(0.1)
    assert message in server[1].read_text()
    # the next request is answered
    assert chat(client, folder, data_url(image)).choices[0].message.content.strip() == expected(image).strip()
