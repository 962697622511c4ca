"""The page: Gradio components around a `Session`. What happens is in the session; this file only wires it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import gradio as gr

from frozenprefix.demo.markup import STYLE, note, view
from frozenprefix.demo.session import Session
from frozenprefix.demo.studio import Studio
from frozenprefix.errors import FrozenPrefixError

TITLE = "frozenprefix"
KEPT_HOURS = 6  # of a session that nobody uses
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
HTML: dict[str, Any] = {"apply_default_css": False}
CSS = (
    STYLE
    + """
.gradio-container { max-width: 75rem !important; margin: 0 auto !important; }
.fp-gallery .gallery-container { height: auto; }
.fp-gallery .grid-wrap { height: auto; min-height: 0 !important; max-height: 26rem; }
.fp-quiet label span { font-weight: 600; }
/* Gradio's blue on dark, and its quiet texts, have too little contrast (WCAG 1.4.3) */
.gradio-container :is(.or, .min_value, .max_value) { color: var(--body-text-color) !important; }
.dark { --color-accent: var(--primary-300); }
.dark .download-link { color: var(--primary-300); }
footer { display: none !important; }
"""
)


def build_page(studio: Studio) -> gr.Blocks:
    """The page of a studio, to be mounted by `serve`.

    Example:
        >>> build_page(studio)  # doctest: +SKIP
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        session = gr.State(lambda: Session(studio), time_to_live=3600 * KEPT_HOURS)
        gr.Markdown(f"# {TITLE}\n{_subtitle(studio)}")
        with gr.Tabs():
            with gr.Tab("Photos and clips", id="look"):
                _look(studio, session)
            with gr.Tab("Chat", id="chat"):
                _chat(studio, session)
            with gr.Tab("Corrections", id="corrections") as tab:
                _corrections(studio, session, tab)
    page.queue(default_concurrency_limit=8, max_size=64, api_open=False)
    return page


def theme() -> gr.themes.Base:
    """Gradio's theme with fonts of the system: nothing is fetched from elsewhere."""
    fonts = ["system-ui", "sans-serif"]
    base = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"])
    # the theme's own blue has too little contrast with white (WCAG 1.4.3)
    return base.set(
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
    )


def _subtitle(studio: Studio) -> str:
    names = " and ".join(f"`{name}`" for name in studio.names)
    return f"Frozen language models that see: {names}. Files stay on the machine that this page runs on."


def _safe(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with errors of the package as messages on the page."""

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except FrozenPrefixError as error:
            raise gr.Error(str(error), duration=12, print_exception=False) from error

    return call


def _safely(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """As `_safe`, for a function that yields."""

    @wraps(function)
    def call(*args: Any) -> Iterator[Any]:
        try:
            yield from function(*args)
        except FrozenPrefixError as error:
            raise gr.Error(str(error), duration=12, print_exception=False) from error

    return call


# ── photos and clips ──


def _look(studio: Studio, session: gr.State) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            files = gr.File(file_count="multiple", label="Drop photos or clips here", height=150)
            folder = gr.UploadButton("Open a folder", file_count="directory", size="sm")
            remarks = gr.HTML(**HTML)
            gallery = gr.Gallery(
                label="Dropped files",
                columns=3,
                object_fit="cover",
                allow_preview=False,
                interactive=False,
                buttons=[],
                visible=False,
                elem_classes="fp-gallery",
            )
            with gr.Accordion("How captions are written", open=False):
                beams = gr.Slider(1, 8, 1, step=1, label="Beams (1 writes word by word)")
                length = gr.Slider(5, 60, 30, step=1, label="Longest caption, in tokens")
        with gr.Column(scale=3, min_width=300):
            viewer = gr.HTML(view(None), elem_id="fp-viewer", **HTML)
            with gr.Row():
                captions = [_model_panel(studio, session, number) for number in range(len(studio.models))]
            with gr.Row():
                question = gr.Textbox(
                    label="Question about the chosen photo", placeholder="What is on the left?", scale=4
                )
                ask = gr.Button("Ask", variant="primary", scale=1, min_width=80)
            with gr.Row():
                answers = [gr.Textbox(label=f"Answer by {name}", interactive=False) for name in studio.names]
    panels = [text for text, _ in captions]
    reasons = [reason for _, reason in captions]
    blank = [gr.HTML("") for _ in reasons]

    def dropped(paths: Sequence[str] | None, session: Session) -> tuple[Any, ...]:
        problems = session.add(paths or [])
        shown = gr.Gallery(session.gallery(), visible=len(session.items) > 1)
        return note(problems), shown, view(session.item), *session.texts(), *[""] * len(blank)

    def write(session: Session, beams: int, length: int) -> Iterator[tuple[Any, ...]]:
        finished = -1
        for texts in session.caption_all(beams=int(beams), max_new_tokens=int(length)):
            done = len(session.captions)
            yield *texts, session.gallery() if done != finished and len(session.items) > 1 else gr.skip()
            finished = done
        yield *session.texts(), session.gallery() if len(session.items) > 1 else gr.skip()

    def choose(session: Session, event: gr.SelectData) -> tuple[Any, ...]:
        session.choose(int(event.index))
        return view(session.item), *session.texts(), *[""] * len(blank)

    def answer(question: str, session: Session) -> Iterator[Any]:
        for texts in session.ask(question):
            yield texts if len(texts) > 1 else texts[0]

    begun = [remarks, gallery, viewer, *panels, *reasons]
    written: list[Any] = []
    for source in (files, folder):
        added = source.upload(_safe(dropped), [source, session], begun, show_progress="minimal", **PRIVATE)
        written.append(
            added.then(_safely(write), [session, beams, length], [*panels, gallery], **ONE_AT_A_TIME, **PRIVATE)
        )
    files.clear(_safe(dropped), [files, session], begun, cancels=written, **PRIVATE)
    # its annotation tells gradio to hand over what was selected, so it is not wrapped
    gallery.select(choose, [session], [viewer, *panels, *reasons], show_progress="hidden", **PRIVATE)
    for trigger in (question.submit, ask.click):
        trigger(_safely(answer), [question, session], answers, **ONE_AT_A_TIME, **PRIVATE)


def _model_panel(studio: Studio, session: gr.State, number: int) -> tuple[gr.Textbox, gr.HTML]:
    """Caption, explanation and correction of one model."""
    name = studio.names[number]
    with gr.Column(min_width=260):
        caption = gr.Textbox(label=f"Caption by {name}", interactive=False, lines=2, elem_classes="fp-quiet")
        with gr.Row():
            why = gr.Button("Why these words?", size="sm", min_width=110)
            wrong = gr.Button("This is wrong", size="sm", min_width=110)
        with gr.Group(visible=False) as form:
            right = gr.Textbox(label=f"What should {name} have written?", lines=2, max_length=500)
            keep = gr.Button("Keep the correction", variant="primary", size="sm")
        done = gr.HTML(**HTML)
        reason = gr.HTML(**HTML)
    why.click(
        _safe(lambda session: session.explain(number)), [session], reason,
        **{**ONE_AT_A_TIME, "show_progress": "minimal"}, **PRIVATE,
    )  # fmt: skip
    wrong.click(lambda: gr.Group(visible=True), None, form, show_progress="hidden", **PRIVATE)

    def kept(right: str, session: Session) -> tuple[Any, ...]:
        return note([session.correct(number, right)]), gr.Group(visible=False), ""

    for trigger in (keep.click, right.submit):
        trigger(_safe(kept), [right, session], [done, form, right], show_progress="hidden", **PRIVATE)
    return caption, reason


# ── chat ──


def _chat(studio: Studio, session: gr.State) -> None:
    choices = [(name, number) for number, name in enumerate(studio.names)]
    number = gr.Radio(choices, value=0, label="Talk to", visible=len(choices) > 1)
    gr.Markdown("The photo that is chosen on the first tab comes in with your next message.")
    talk = gr.Chatbot(label="Conversation", height=420, buttons=[], feedback_options=None)
    with gr.Row():
        message = gr.Textbox(label="Message", scale=4)
        send = gr.Button("Send", variant="primary", scale=1, min_width=80)
    again = gr.Button("Start again", size="sm")

    def reply(number: int, message: str, session: Session) -> Iterator[tuple[Any, str]]:
        for messages in session.chat(number, message):
            yield messages, ""

    def reset(number: int, session: Session) -> list[Any]:
        session.reset_chat(number)
        return []

    for trigger in (message.submit, send.click):
        trigger(_safely(reply), [number, message, session], [talk, message], **ONE_AT_A_TIME, **PRIVATE)
    for trigger in (again.click, talk.clear):
        trigger(reset, [number, session], talk, show_progress="hidden", **PRIVATE)
    number.change(lambda number, session: session.messages(number), [number, session], talk, **PRIVATE)


# ── corrections ──


def _corrections(studio: Studio, session: gr.State, tab: gr.Tab) -> None:
    listed = gr.HTML(**HTML)
    with gr.Row():
        choices = [(name, number) for number, name in enumerate(studio.names)]
        number = gr.Radio(choices, value=0, label="Mapper to train", visible=len(choices) > 1)
        steps = gr.Slider(5, 200, 30, step=5, label="Steps")
    with gr.Row():
        train = gr.Button("Train the mapper on the corrections", variant="primary", min_width=200)
        stop = gr.Button("Stop the training", min_width=120)
    progress = gr.HTML(**HTML)
    compared = gr.HTML(**HTML)
    with gr.Row(visible=False) as decision:
        keep = gr.Button("Keep the new mapper", min_width=150)
        back = gr.Button("Go back to the old one", min_width=150)

    def run(number: int, steps: int, session: Session) -> Iterator[tuple[Any, ...]]:
        table = ""
        for line, table in session.train(number, steps=int(steps)):
            yield note([line]), table, gr.Row(visible=bool(table))

    def decide(action: Callable[[Session], str]) -> Callable[[Session], tuple[Any, ...]]:
        return lambda session: (note([action(session)]), gr.Row(visible=False))

    tab.select(lambda session: session.corrections_table(), [session], listed, show_progress="hidden", **PRIVATE)
    options: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "training", "show_progress": "hidden"}
    train.click(_safely(run), [number, steps, session], [progress, compared, decision], **options, **PRIVATE)
    stop.click(lambda session: session.stop_training(), [session], None, show_progress="hidden", **PRIVATE)
    keep.click(_safe(decide(Session.keep)), [session], [progress, decision], show_progress="hidden", **PRIVATE)
    back.click(_safe(decide(Session.go_back)), [session], [progress, decision], show_progress="hidden", **PRIVATE)
