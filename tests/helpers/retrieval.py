"""A model of images and texts whose vectors are known beforehand: what the retrieval tests share."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from tests.helpers.drawings import COLOURS

EYE = np.eye(4, dtype=np.float32)


class MeanColour(torch.nn.Module):
    """float[n, 3, H, W] -> the mean colour, float[n, 1, 3]."""

    def forward(self, pixel_values):
        return pixel_values.mean(dim=(2, 3))[:, None]


class ColourModel:
    """Sees the mean colour of an image; knows red, green and blue by name. Counts the images that it sees."""

    def __init__(self, name: str = "one"):
        self.config = SimpleNamespace(identity={"vision_encoder": {"name": name}})
        self.device = torch.device("cpu")
        self.vision_encoder = MeanColour()
        self.seen = 0

    def eval(self):
        return self

    def trainable_state(self):
        return {"weight": torch.ones(1)}

    def encode_image(self, image_features):
        self.seen += len(image_features)
        ink = 1 - image_features[:, 0]  # white paper takes no part
        return torch.nn.functional.normalize(ink.max(dim=1, keepdim=True).values - ink, dim=-1)

    def encode_text(self, input_ids, attention_mask):
        return torch.nn.functional.normalize(input_ids.float(), dim=-1)


class ColourProcessor:
    """The image's pixels as they are, and a text as which colours it names."""

    class image_processor:
        def __call__(self, images, return_tensors):
            pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
            return {"pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2)}

        def to_json_string(self):
            return "{}"

    def __init__(self):
        self.image_processor = self.image_processor()

    def prepare_texts(self, texts):
        ids = torch.tensor([[int(c in text) for c in COLOURS] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
