"""Functions of `captions.yaml`, a task of lmms-eval: the metrics of its own caption tasks, by pycocoevalcap."""

from __future__ import annotations

import shutil
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"]]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    row = {"id": doc["id"], "captions": doc["captions"], "prediction": results[0]}
    return dict.fromkeys(("CIDEr", "Bleu_4", "ROUGE_L"), row)


def cider(rows: list[dict[str, Any]]) -> float:
    return float(_score(Cider(), rows))


def bleu_4(rows: list[dict[str, Any]]) -> float:
    return float(_score(Bleu(4), rows)[3])


def rouge_l(rows: list[dict[str, Any]]) -> float:
    return float(_score(Rouge(), rows))


def _score(scorer: Any, rows: list[dict[str, Any]]) -> Any:
    references = {row["id"]: [{"caption": text} for text in row["captions"]] for row in rows}
    candidates = {row["id"]: [{"caption": row["prediction"]}] for row in rows}
    score, _ = scorer.compute_score(_tokenize(references), _tokenize(candidates))
    return score


def _tokenize(captions: dict[str, list[dict[str, str]]]) -> dict[str, list[str]]:
    if shutil.which("java"):
        return PTBTokenizer().tokenize(captions)
    from frozenprefix.evaluation.metrics import ptb_tokenize  # the same tokens without Java

    return {name: [" ".join(ptb_tokenize(row["caption"])) for row in rows] for name, rows in captions.items()}
