"""Checkpoints of ClipCap: logits of the imported model equal the paper's; what does not fit is named."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from typer.testing import CliRunner

from frozenprefix import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from frozenprefix.cli.main import app
from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.export import import_clipcap
from frozenprefix.utils.tensors import save_tensors
from tests.export.clipcap_paper import ClipCap

WORDS = torch.tensor([[7, 8, 9], [20, 11, 12]])


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """`features(512)` -> section of an encoder that gives such vectors, from a table."""
    folder = tmp_path_factory.mktemp("features")

    def make(width: int) -> dict:
        path = folder / f"{width}.safetensors"
        save_tensors({"a": torch.randn(1, width), "b": torch.randn(1, width)}, path)
        return {"source": "features", "path": str(path)}

    return make


@pytest.fixture
def gpt(tiny_lm):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(tiny_lm("gpt2")).eval()


def saved(model, path, *, whole: bool = True):
    state = {key: value for key, value in model.state_dict().items() if whole or key.startswith("clip_project")}
    torch.save(state, path)
    return path


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
@pytest.mark.parametrize(("length", "width"), [(10, 512), (40, 640)])
@pytest.mark.parametrize("tuned", [False, True])
def test_logits_equal_the_papers(kind, length, width, tuned, gpt, tiny_lm, features, tmp_path):
    torch.manual_seed(length + tuned)
    if tuned:
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    paper = ClipCap(gpt, kind, width, length).eval()
    file = saved(paper, tmp_path / "clipcap.pt")
    import_clipcap(file, tmp_path / "out", vision_encoder=features(width), language_model=str(tiny_lm("gpt2")))

    model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = FrozenPrefixProcessor.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "language_model").is_dir() == tuned
    placeholders = torch.full((2, length), processor.image_token_id)
    vectors = torch.randn(2, width)
    with torch.no_grad():
        ours = model(torch.cat([placeholders, WORDS], dim=1), image_features=vectors[:, None]).logits
    expected = paper(WORDS, vectors)
    assert expected.std() > 0.01
    assert (ours - expected).abs().max() < 1e-5
    stop = processor.tokenizer(".")["input_ids"][-1]
    assert stop in model.generation_config.eos_token_id


def test_mapper_alone_and_unit_features(gpt, tiny_lm, features, tmp_path):
    """A file without gpt.*; features that were scaled to unit length."""
    paper = ClipCap(gpt, "mlp", 512, 10).eval()
    file = saved(paper, tmp_path / "mapper.pt", whole=False)
    lm = str(tiny_lm("gpt2"))
    model = import_clipcap(file, tmp_path / "out", vision_encoder=features(512), language_model=lm, unit_features=True)
    vectors = torch.randn(2, 512) * 7
    with torch.no_grad():
        expected = paper.clip_project(vectors / vectors.norm(dim=-1, keepdim=True)).view(2, 10, -1)
        assert (model.map_features(vectors[:, None]) - expected).abs().max() < 1e-5


def test_old_buffers_are_passed_over(gpt, tiny_lm, features, tmp_path):
    paper = ClipCap(gpt, "mlp", 512, 10)
    state = {**paper.state_dict(), "gpt.transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(state, tmp_path / "old.pt")
    lm = str(tiny_lm("gpt2"))
    import_clipcap(tmp_path / "old.pt", tmp_path / "out", vision_encoder=features(512), language_model=lm)
    assert not (tmp_path / "out" / "language_model").exists()


def test_wrong_dimensions_are_named(gpt, tiny_lm, features, tmp_path):
    lm = str(tiny_lm("gpt2"))
    file = saved(ClipCap(gpt, "mlp", 512, 10), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"reads 1 vector of 512 features, but encoder .* gives 1 of 640"):
        import_clipcap(file, tmp_path / "out", vision_encoder=features(640), language_model=lm)
    other = copy.deepcopy(gpt)
    other.config.n_embd = 24  # a mapper for another GPT-2
    file = saved(ClipCap(other, "mlp", 512, 5), tmp_path / "b.pt", whole=False)
    with pytest.raises(ConfigError, match=r"clip_project.model.2.weight makes 120 numbers, expected a multiple of 32"):
        import_clipcap(file, tmp_path / "out", vision_encoder=features(512), language_model=lm)
    file = saved(ClipCap(other, "transformer", 512, 5), tmp_path / "c.pt", whole=False)
    with pytest.raises(ConfigError, match="prefix_const has width 24, expected 32"):
        import_clipcap(file, tmp_path / "out", vision_encoder=features(512), language_model=lm)
    file = saved(ClipCap(gpt, "mlp", 100, 5), tmp_path / "d.pt", whole=False)
    with pytest.raises(ConfigError, match=r"reads 100 features, expected 512 .* the encoder with --vision"):
        import_clipcap(file, tmp_path / "out", language_model=lm)
    assert not (tmp_path / "out").exists()


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def bad_files(folder):
    """name -> (file, what its message says)."""
    files = {}

    def add(name, write, message):
        write(folder / name)
        files[name] = (folder / name, message)

    add(
        "code.pt",
        lambda path: path.write_bytes(pickle.dumps({"clip_project.model.0.weight": Harmful(folder / "trace")})),
        "not a file of",
    )
    add(
        "harm.pt",
        lambda path: torch.save({"clip_project.a": Harmful(folder / "trace")}, path),
        "not a file of plain tensors",
    )
    add("noise.pt", lambda path: path.write_bytes(bytes(range(256)) * 20), "noise.pt")
    add("empty.pt", lambda path: path.write_bytes(b""), "empty.pt")
    add("list.pt", lambda path: torch.save([1, 2], path), "no mapping from names to tensors")
    add("foreign.pt", lambda path: torch.save({"layer.weight": torch.ones(2)}, path), "no mapper of ClipCap")
    odd = {"clip_project.model.0.weight": torch.ones(32, 512)}
    add("odd.pt", lambda path: torch.save(odd, path), "neither ClipCap's MLP nor its transformer")
    nan = {"clip_project.model.0.weight": torch.full((2, 2), float("nan"))}
    add("nan.pt", lambda path: torch.save(nan, path), "values that are not finite")
    torch.save({"clip_project.model.0.weight": torch.ones(1000, 100)}, folder / "whole.pt")
    data = (folder / "whole.pt").read_bytes()
    add("cut.pt", lambda path: path.write_bytes(data[: len(data) // 2]), "cut.pt")
    files["missing.pt"] = (folder / "missing.pt", "expected a file that exists")
    return files


def test_bad_files_are_one_error_each(tiny_lm, features, tmp_path):
    for name, (file, message) in bad_files(tmp_path).items():
        with pytest.raises(AssetError, match=message):
            import_clipcap(file, tmp_path / "out", vision_encoder=features(512), language_model=str(tiny_lm("gpt2")))
        assert not (tmp_path / "out").exists(), name
    assert not (tmp_path / "trace").exists(), "code in a file was run"


def test_command(gpt, tiny_lm, features, tmp_path):
    file = saved(ClipCap(gpt, "transformer", 512, 10), tmp_path / "a.pt")
    section = "{source: features, path: '" + features(512)["path"] + "'}"
    arguments = ["--language-model", str(tiny_lm("gpt2")), "--vision-encoder", section]
    result = CliRunner().invoke(app, ["import", "clipcap", str(file), "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0, result.output
    assert "mapper 'transformer' with prefix length 10; GPT-2 is frozen" in result.output
    result = CliRunner().invoke(app, ["import", "clipcap", str(file), "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert "exists; give a new or empty folder" in result.output
