"""One self-contained HTML page of explanations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frozenprefix.errors import DataError
from frozenprefix.interpret.explain.explanation import SEEN, TRUSTED, ExplainedWord, Explanation, trusted
from frozenprefix.interpret.explain.figure import overlay
from frozenprefix.interpret.report import embedded_image, image_uri, page_template
from frozenprefix.utils import write_text_atomic

_MAP_SIDE = 160  # pixels
_MOST_MAPS = 8  # words of an image
_TITLES = {
    "evidence": "No evidence",
    "occlusion": "No occlusion",
    "attention": "No attention",
    "prefix": "No nearest words",
}


def write_explanations(path: str | Path, explanations: Sequence[Explanation], *, title: str) -> Path:
    """Write a page that needs no other file and no network.

    Args:
        path: the HTML file.

    Returns:
        The path.

    Raises:
        DataError: for no explanations.

    Example:
        >>> from frozenprefix.interpret import explain
        >>> explanation = explain(captioner, image, "a <red> circle", heat_maps=False)
        >>> page = write_explanations(tmp_path / "page.html", [explanation], title="One image")
        >>> "<red>" in page.read_text(encoding="utf-8")
        False
    """
    if not explanations:
        raise DataError("explanations: got none, expected at least one")
    correlation = trusted(explanations)
    seen = [values for each in explanations if (values := _of_seen(each)) is not None]
    seen_values = np.concatenate(seen) if seen else np.empty(0)
    attention_first = correlation is not None and correlation >= TRUSTED
    page = page_template("explain.html").render(
        title=title,
        others=explanations[0].others,
        colour=evidence_colour,
        correlation=correlation,
        trusted=attention_first,
        needed=TRUSTED,
        count=sum(len(each.words) for each in explanations if each.attention is not None),
        seen_correlation=float(seen_values.mean()) if len(seen_values) else None,
        seen_count=len(seen_values),
        explanations=[_entry(each, attention_first) for each in explanations],
    )
    write_text_atomic(path, page)
    return Path(path)


def evidence_colour(evidence: float | None) -> str:
    """CSS of a word: green as the image speaks for it, up to 4 nats, and red as it speaks against it.

    Example:
        >>> evidence_colour(2.0), evidence_colour(None)
        ('background: rgba(30, 150, 70, 0.30)', '')
    """
    if evidence is None:
        return ""
    red, green, blue = (30, 150, 70) if evidence > 0 else (200, 50, 40)
    strength = min(1.0, abs(evidence) / (4.0 if evidence > 0 else 2.0)) * 0.6
    return f"background: rgba({red}, {green}, {blue}, {strength:.2f})"


def _of_seen(explanation: Explanation) -> np.ndarray | None:
    """Rank correlations of the words that the image speaks for."""
    values, evidence = explanation.rank_correlations, explanation.evidence
    return None if values is None or evidence is None else values[evidence >= SEEN]


def _entry(explanation: Explanation, attention_first: bool) -> dict[str, Any]:
    image: dict[str, Any] = {} if explanation.image is None else embedded_image(explanation.image, explanation.text)
    return {
        "image": image,
        "name": explanation.name,
        "prompt": explanation.prompt.replace("<image>", "").strip(),
        "words": [
            {"text": word.text, "colour": evidence_colour(word.evidence), "title": _title(word)}
            for word in explanation.words
        ],
        "reasons": [f"{_TITLES[name]}: {reason}." for name, reason in explanation.unavailable.items()],
        "maps": _maps(explanation, attention_first),
        "tokens": _tokens(explanation),
        "prefix": [(_scored(place.by_cosine, ""), _scored(place.by_head, "%")) for place in explanation.prefix],
    }


def _title(word: ExplainedWord) -> str:
    evidence = "" if word.evidence is None else f"evidence {word.evidence:+.2f}, "
    return f"{evidence}log p {word.log_prob:.2f}"


def _maps(explanation: Explanation, attention_first: bool) -> list[dict[str, str]]:
    if explanation.image is None or explanation.occlusion is None:
        return []
    kinds = list(explanation.heat_maps.items())
    if attention_first:
        kinds.reverse()
    small = explanation.image.copy()
    small.thumbnail((_MAP_SIDE, _MAP_SIDE))
    correlations = explanation.rank_correlations
    entries = []
    for number in _mapped(explanation):
        for kind, (maps, highest) in kinds:
            note = f"r = {correlations[number]:+.2f}" if correlations is not None and kind == "attention" else ""
            if kind == "occlusion":
                note = f"up to {maps[number].max():.1f}"
            source = image_uri(overlay(small, maps[number], highest=highest))
            entries.append({"word": explanation.words[number].text, "kind": kind, "note": note, "src": source})
    return entries


def _mapped(explanation: Explanation) -> list[int]:
    """The words that get maps, in the order of the text: those for which the image matters most.

    Words under half of `SEEN` get none if others have more: "a" and "the" look nowhere.
    """
    assert explanation.occlusion is not None
    strength = explanation.occlusion.max(axis=(1, 2))
    if explanation.evidence is not None:
        strength = np.maximum(strength, explanation.evidence)
    best = sorted(range(len(strength)), key=lambda number: -float(strength[number]))[:_MOST_MAPS]
    return sorted(number for place, number in enumerate(best) if place < 3 or strength[number] >= SEEN / 2)


def _tokens(explanation: Explanation) -> list[dict[str, Any]]:
    return [
        {
            "text": token.text.strip() or repr(token.text),
            "probability": f"{token.probability:.1%}",
            "evidence": "" if word.evidence is None or place else f"{word.evidence:+.2f}",
            "alternatives": _scored(token.alternatives, "%"),
        }
        for word in explanation.words
        for place, token in enumerate(word.choices)
    ]


def _scored(words: Sequence[tuple[str, float]], unit: str) -> list[tuple[str, str]]:
    return [(text.strip() or repr(text), f"{value:.1%}" if unit else f"{value:.2f}") for text, value in words]
