"""HTML of the page's own parts: an image, an explanation with maps under its words, tables. Everything is escaped."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from frozenprefix.demo.inputs import Item
from frozenprefix.interpret import Explanation
from frozenprefix.interpret.explain import ExplainedWord, overlay
from frozenprefix.interpret.explain.page import evidence_colour
from frozenprefix.interpret.report import data_uri

STYLE = """
.fp-view { position: relative; max-width: 28rem; margin: 0; }
.fp-view img { display: block; width: 100%; height: auto; border-radius: .375rem; background: #fff; }
.fp-view figcaption, .fp-note, .fp-empty { color: var(--body-text-color); font-size: .95rem; margin: .25rem 0; }
.fp-note ul { margin: 0; padding-left: 1.2rem; }
.fp-words { line-height: 2; margin: .5rem 0 0; padding-bottom: 4.5rem; }
.fp-words button { font: inherit; color: inherit; border: 0; border-bottom: 2px dotted currentColor;
  border-radius: .2rem; padding: 0 .2rem; min-height: 1.75rem; cursor: help; background: none; }
.fp-words button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 1px; }
.fp-words .fp-map, .fp-words .fp-tip { display: none; position: absolute; }
.fp-words .fp-map { inset: 0 auto auto 0; }
.fp-words .fp-tip { left: 0; right: 0; bottom: 0; min-height: 4rem; text-align: left; font-size: .85rem;
  line-height: 1.4; }
.fp-words button:hover > span, .fp-words button:focus > span, .fp-words button:hover > img,
.fp-words button:focus > img { display: block; }
.fp-table { border-collapse: collapse; width: 100%; font-size: .95rem; }
.fp-table caption { text-align: left; font-weight: 600; padding: .25rem 0; }
.fp-table th, .fp-table td { text-align: left; vertical-align: top; padding: .35rem .5rem .35rem 0;
  border-bottom: 1px solid var(--border-color-primary); color: var(--body-text-color); overflow-wrap: break-word; }
.fp-table th { white-space: nowrap; }
.fp-table img { width: 4rem; min-width: 4rem; height: 4rem; object-fit: cover; border-radius: .25rem; }
.fp-scroll { overflow-x: auto; }
"""


def image_uri(image: Image.Image, *, quality: int = 85) -> str:
    """A `data:` address with the image as WebP, a fraction of the size of what reports hold.

    Example:
        >>> image_uri(image)[:23]
        'data:image/webp;base64,'
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=quality)
    return data_uri(buffer.getvalue(), "webp")


def note(lines: Sequence[str]) -> str:
    """A list of remarks; empty for none.

    Example:
        >>> note(["<b>.txt: no image"])
        '<div class="fp-note" role="status"><ul><li>&lt;b&gt;.txt: no image</li></ul></div>'
    """
    if not lines:
        return ""
    return f'<div class="fp-note" role="status"><ul>{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul></div>'


def view(item: Item | None) -> str:
    """The chosen photo, or the middle frame of a clip.

    Example:
        >>> view(None)
        '<p class="fp-empty">Nothing is chosen yet.</p>'
    """
    if item is None:
        return '<p class="fp-empty">Nothing is chosen yet.</p>'
    what = item.name if item.kind == "photo" else f"{item.name} (a clip; its middle frame is shown)"
    image = f'<img src="{image_uri(item.preview)}" alt="{escape(what)}">'
    return f'<figure class="fp-view">{image}<figcaption>{escape(what)}</figcaption></figure>'


def explained(explanation: Explanation) -> str:
    """The image as the encoder sees it, and its words, coloured by evidence; each shows its heat map when pointed at.

    Example:
        >>> from frozenprefix.interpret import Explainer
        >>> explained(Explainer(captioner)(image, "a red circle")).count("<button")
        3
    """
    image = (
        "" if explanation.image is None else f'<img src="{image_uri(explanation.image)}" alt="as the encoder sees it">'
    )
    words = " ".join(_word(explanation, number) for number in range(len(explanation.words)))
    legend = f"<figcaption>{_legend(explanation)}</figcaption>"
    return f'<figure class="fp-view">{image}{legend}<p class="fp-words">{words}</p></figure>'


def _word(explanation: Explanation, number: int) -> str:
    word = explanation.words[number]
    heat = ""
    if explanation.image is not None and "occlusion" in explanation.heat_maps:
        maps, highest = explanation.heat_maps["occlusion"]
        shown = overlay(explanation.image, maps[number], highest=highest)
        heat = f'<img class="fp-map" src="{image_uri(shown, quality=70)}" alt="">'
    style = evidence_colour(word.evidence)
    tip = f'<span class="fp-tip">{escape(_tip(word))}</span>'
    return f'<button type="button" style="{style}">{escape(word.text)}{heat}{tip}</button>'


def _tip(word: ExplainedWord) -> str:
    told = [f"“{word.text}”"]
    if word.evidence is not None:
        told.append(f"evidence {word.evidence:+.1f} nats")
    if word.choices:
        first = word.choices[0]
        told.append(f"probability {first.probability:.0%}")
        others = [f"{text.strip()} {share:.0%}" for text, share in first.alternatives if text != first.text]
        if others:
            told.append("instead: " + ", ".join(others[:3]))
    return " · ".join(told)


def _legend(explanation: Explanation) -> str:
    told = []
    if explanation.evidence is None:
        told.append("no other images are at hand, so the words have no evidence")
    else:
        told.append(f"green: the image speaks for the word, against {explanation.others} other images; red: against it")
    if explanation.occlusion is not None:
        told.append("point at a word for its heat map: where covering the image makes the word less likely")
    else:
        told.append("no heat maps" + "".join(f" ({reason})" for reason in list(explanation.unavailable.values())[:1]))
    return escape("; ".join(told) + ".")


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str | Image.Image]]) -> str:
    """A table whose cells are texts or images.

    Example:
        >>> table("Corrections", ["right"], [["a dog"]]).count("<td>")
        1
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    region = f'<div class="fp-scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
    table = f'<table class="fp-table"><caption>{escape(caption)}</caption>'
    return f"{region}{table}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(cell: str | Image.Image) -> str:
    if isinstance(cell, str):
        return escape(cell)
    small = cell.copy()
    small.thumbnail((144, 144))
    return f'<img src="{image_uri(small, quality=70)}" alt="">'
