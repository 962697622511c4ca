"""The prompts of few_shot.yaml: drawings with made-up names, then a drawing to be named.

    python recipes/few_shot.py data/episodes

Each prompt is a conversation of one turn in LLaVA's format, with three pictures. The drawings are easy-VQA's, by colour
and shape; training and validation have different ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from frozenprefix.data.sources import load_source
from frozenprefix.inference.episodes import binding_episodes

EASY_VQA = "pypi://easy-vqa==1.0/easy_vqa/data"
EPISODES = {"train": 4800, "val": 100}


def write_episodes(file: Path, data: str, split: str, count: int) -> None:
    """Write `count` episodes of two names and one shot each, made of the drawings of a split."""
    source = {"type": "easy_vqa", "path": data, "split": split, "questions": False, "classes": "color shape"}
    rows = [
        {
            "id": episode.id,
            "image": [str(path.resolve()) for path in episode.images],
            "conversations": [{"from": "human", "value": episode.prompt}, {"from": "gpt", "value": episode.answer}],
        }
        for episode in binding_episodes(load_source(source), ways=2, shots=1, episodes=count)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.json and val.json are written")
    parser.add_argument("--data", default=EASY_VQA, help="easy-VQA's folder, or a reference to it")
    given = parser.parse_args()
    for part, number in EPISODES.items():
        write_episodes(given.folder / f"{part}.json", given.data, part, number)
