"""Every benchmark in its tiny mode, and the pieces that their figures rest on."""

from __future__ import annotations

import json
import os
import statistics
import sys

import numpy as np
import pytest
import torch

from benchmarks import (
    answers,
    attention,
    audit,
    blind_twin,
    closed_form_start,
    common,
    evidence,
    experiments,
    generation,
    latency,
    learning_curve,
    linear_probe,
    llama_cpp,
    loading,
    memory,
    packing_curve,
    products,
    step_profile,
    streaming,
    training_step,
)
from benchmarks.baselines import clipcap_beam_search
from benchmarks.plan_check import small_llama
from benchmarks.recipes import save_random_lm, synthetic_photos
from benchmarks.workloads import features_of, our_model, shapes, synthetic_captions
from frozenprefix.config import write_yaml
from frozenprefix.kernels.linear import prepackable_dtypes
from frozenprefix.models.packing import build_trie
from tests.helpers import ROOT
from tests.helpers.recipes import tiny_recipe_dict


def test_attention_runs_and_is_exact(tmp_path):
    report = attention.main(["--quick", "--json", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text()) == report
    assert all(case["max_difference_fp32"] < 1e-5 for case in report["cases"])
    assert report["machine"]["torch"] == torch.__version__
    assert attention.markdown(report).count("\n| tiny, ") == 2


def test_memory_of_an_arm(monkeypatch):
    monkeypatch.setattr(memory, "ARMS", {"rows padded": (32, None)})
    report = memory.main(["--quick", "--json", os.devnull])
    assert report["arms"]["rows padded"]["mb"] > 100
    assert "rows padded" in memory.markdown(report)


def test_streamed_and_listed_samples_are_read(tmp_path):
    sizes = streaming.Sizes(samples=200, per_shard=50, read=64, rated=64, kills=0, rounds=1)
    save_random_lm(tmp_path / "lm", small_llama(48, 2))
    rates = streaming.measure_rates(tmp_path, sizes)
    assert rates.keys() == {"images", "features"}
    assert all(row["streamed_per_s"] > 0 < row["list_per_s"] for row in rates.values())
    streaming.write_all(tmp_path / "shards", sizes.samples, sizes, images=False)
    assert streaming.memory_arm(tmp_path / "shards", 2, 64)["samples"] == 100
    out = tmp_path / "steps.jsonl"
    for steps, workers, parts in ((1, 0, 1), (2, 1, 2)):
        streaming.order_arm(tmp_path / "shards", out, steps, workers, parts)
    streaming.order_arm(tmp_path / "shards", tmp_path / "whole.jsonl", 2, 0, 1)
    killed, whole = (streaming.read_steps(path) for path in (out, tmp_path / "whole.jsonl"))
    assert [sorted(step) for step in killed] == [sorted(step) for step in whole]


def test_rows_are_loaded():
    report = loading.main(["--quick", "--json", os.devnull])
    assert report["arms"]["stream"]["images"] > report["arms"]["list"]["images"] > 0
    assert loading.markdown(report).count("\n") == 4


@pytest.mark.skipif(not prepackable_dtypes(), reason="PyTorch has no oneDNN here")
def test_products_run_and_agree():
    kinds = ("tiny", "layers of SmolLM2-135M", "the same, prepacked products only")
    report = products.main(["--quick"])
    names = [f"{what}, {str(dtype)[6:]}" for what in kinds for dtype in prepackable_dtypes()]
    assert [case["name"] for case in report["cases"]] == names
    assert all(case["max_difference"] < 1e-6 for case in report["cases"] if "float32" in case["name"])
    assert all(case["gflops"][arm] > 0 for case in report["cases"] for arm in ("plain", "prepacked"))
    assert products.markdown(report).count("\n| tiny, ") == len(prepackable_dtypes())


@pytest.mark.skipif(not prepackable_dtypes(), reason="PyTorch has no oneDNN here")
def test_a_step_is_accounted_for():
    report = step_profile.main(["--quick"])
    for made in report["shapes"].values():
        assert sum(made["shares"].values()) == pytest.approx(1)
        assert all(0 < share < 1 for share in made["shares"].values()), "nothing is counted twice"
    assert step_profile.kind_of("aten::addmm") != step_profile.kind_of("aten::add_")
    assert step_profile.kind_of("aten::empty") == step_profile.REST


def test_llama_cpp_gives_the_same_captions(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    report = llama_cpp.main(["--quick", "--json", str(tmp_path / "a.json")])
    assert report["same_as_fp32"] == {"ours_fp32": 1.0, "llama_f32": 1.0}
    assert len({tuple(ids) for ids in report["texts"]["llama_f32"]}) > 1
    assert "| llama.cpp, the same weights as float32 | " in llama_cpp.markdown(report)


def test_packing_gives_the_curve_of_plain_batches():
    report = packing_curve.main(["--quick"])
    assert report["steps"] == 5
    assert report["max_training_difference"] < 1e-4
    assert "| 5 | " in packing_curve.markdown(report)


def test_the_curve_is_that_of_the_recipe(tmp_path, monkeypatch):
    """Its warm-up stays, which a recipe of few steps would not have; overrides come last."""
    photos = synthetic_photos(tmp_path / "photos", 2, (32, 32))
    monkeypatch.setattr(packing_curve, "photos", lambda folder, count: (dict(photos), "made here"))
    path = ROOT / "recipes" / "mlp.yaml"
    recipe = packing_curve.full_recipe(tmp_path, "flat", path, 80, ["training.precision=fp32"])
    assert (recipe.training.max_steps, recipe.training.warmup_steps, recipe.training.packing) == (80, 50, "flat")
    assert recipe.training.precision == "fp32"
    with pytest.raises(SystemExit):
        packing_curve.main(["--quick", "training.precision=fp32"])


def test_generation_runs(tmp_path):
    report = generation.main(["--quick"])
    assert report["same_captions"] == {"fp32": 1.0, "bf16": report["same_captions"]["bf16"]}
    assert set(report["images_per_s"]) == {"clipcap", "transformers_bf16", "ours_fp32", "ours_bf16"}
    assert "| ours bf16 / ClipCap |" in generation.markdown(report)


def test_answers_run_and_are_the_same():
    report = answers.main(["--quick", "--json", os.devnull])
    assert report["same_answers_fp32"] == 1.0
    assert report["answers"] > 100
    assert set(report["answers_per_s"]) == {"per_question", "shared"}
    assert report["note"].endswith("it shows only that the script works")
    assert "| ratio (median over the rounds) |" in answers.markdown(report)


def test_latency_runs_and_both_arms_write_the_same(tmp_path):
    report = latency.main(["--quick", "--json", os.devnull, "--words", "3", "--precision", "fp32"])
    assert report["same_tokens"] is True
    assert {"encode", "prefix", "ours: first token", "transformers: further token"} <= set(report["seconds"])
    assert all(each["p50"] <= each["p95"] for each in report["seconds"].values())
    assert "| transformers / ours, caption |" in latency.markdown(report)


def test_training_step_runs_and_its_gradient_is_exact(monkeypatch):
    class HereArm:
        """An arm in this process."""

        def __init__(self, command: list[str]):
            shape, arm = (command[command.index(name) + 1] for name in ("--shape", "--serve"))
            self.run = training_step.take_steps(arm, shapes(quick=True)[shape])
            self.peak_rss_mib = 400.0 if arm == "clipcap" else 100.0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    used = {"mfu": 0.5, "mfu_low": 0.4, "mfu_high": 0.6, "mfu_small_step": 0.4, "gemm_peak_gflops": 100.0}
    monkeypatch.setattr(common, "Arm", HereArm)
    monkeypatch.setattr(training_step, "in_own_process", lambda command: used)
    report = training_step.main(["--quick"])
    assert set(report["shapes"]) == {"gpt2", "llama"}
    assert report["max_rel_grad_error"] < 1e-5
    assert report["peak_rss_ratio"] == 0.25
    assert set(report["shapes"]["llama"]["captions_per_s"]) == {
        "clipcap", "ours_fp32", "ours_bf16", "llava_fp32", "llava_bf16",
    }  # fmt: skip
    assert report["ratio_bf16"] == min(made["ratio_bf16"] for made in report["shapes"].values())
    assert "| ours bf16 / ClipCap |" in training_step.markdown(report)


def test_an_arm_runs_when_it_is_asked_to():
    code = "from benchmarks import common; common.serve(dict)"
    with common.Arm([sys.executable, "-c", code]) as arm:
        arm.run()
        arm.run()
        assert arm.peak_rss_mib > 10
    with common.Arm([sys.executable, "-c", ""]) as arm, pytest.raises(RuntimeError, match="ended early"):
        arm.run()


def test_clipcap_leaves_gradients_on_the_language_model():
    """What this toolkit saves must be there to be saved."""
    shape = shapes(quick=True)["gpt2"]
    captions = synthetic_captions(20, shape.config.vocab_size)
    step = training_step.make_arm("clipcap", shape, captions)
    before = {name: p.detach().clone() for name, p in step.mapper.named_parameters()}
    step(features_of(2), captions[:2])
    assert all(p.grad is not None for p in step.language_model.parameters())
    assert all(p.grad is None for p in step.mapper.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in step.mapper.named_parameters())


def test_useful_flops_by_hand():
    """Four operations per weight and token, for forward and back, and the head where something is predicted."""
    shape = shapes(quick=True)["gpt2"]
    ours = training_step.OurStep(shape, torch.float32)
    captions = [[[40, 41], [40, 42]]]
    packed = ours.pack(captions)
    tokens = training_step.PREFIX + 3
    assert (packed.input_ids.numel(), len(packed.predict_index)) == (tokens, 4)
    linear = 4 * 2 * (48 * 144 + 48 * 48 + 2 * 48 * 192) * tokens
    seen = sum(range(1, 12)) + 2 * 12  # the prefix and the first word in a line, then two words behind them
    pairs = 12 * 48 * seen * 2
    head = 4 * 48 * 500 * 4
    mapper = 6 * sum(p.numel() for p in ours.model.mapper.parameters() if p.ndim == 2)
    assert training_step.useful_flops(ours, captions) == linear + pairs + head + mapper


def test_captions_are_as_long_and_as_alike_as_real_ones():
    captions = synthetic_captions(1000, 50257)
    lengths = [len(words) for texts in captions for words in texts]
    assert 11 < statistics.mean(lengths) < 12
    assert 2.3 < statistics.pstdev(lengths) < 3
    assert min(lengths) == 7
    image = 60000
    nodes = sum(len(build_trie(group, image).ids) for group in training_step.targets_of(captions, image))
    shared = 1 - (nodes - 1000 * training_step.PREFIX) / sum(lengths)
    assert 0.07 < shared < 0.11


def test_clipcaps_search_finds_the_best_text_when_all_are_kept():
    """With as many beams as first words it is an exhaustive search over two words."""
    model = our_model(shapes(quick=True)["gpt2"].config, torch.float32).eval().language_model
    prefix = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0))
    found = clipcap_beam_search(model, prefix, num_beams=500, new_tokens=2, end=None).tolist()
    with torch.no_grad():
        first = model(inputs_embeds=prefix).logits[0, -1].log_softmax(-1)
        words = model.get_input_embeddings()(torch.arange(500))[:, None]
        second = model(inputs_embeds=torch.cat([prefix.expand(500, -1, -1), words], 1)).logits[:, -1].log_softmax(-1)
    best = int((first[:, None] + second).argmax())
    assert found == [best // 500, best % 500]


def test_every_kind_of_processor_has_its_own_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:begin -->\n<!-- on Intel Xeon, AMX -->\ntheirs\n<!-- a:end -->\nafter\n")
    for value in (0.5, 12345.6):
        common.write_section(page, "a", "AMD EPYC, AVX2", common.table(["x"], [[value]]))
    assert page.read_text() == (
        "before\n<!-- a:begin -->\n<!-- on AMD EPYC, AVX2 -->\n| x |\n| --- |\n| 12,346 |\n\n"
        "<!-- on Intel Xeon, AMX -->\ntheirs\n<!-- a:end -->\nafter\n"
    )
    with pytest.raises(SystemExit, match="no section between"):
        common.write_section(page, "b", "AMD EPYC, AVX2", "")


@pytest.mark.parametrize(
    ("model_name", "flags", "kind"),
    [
        ("AMD EPYC 9R14 96-Core Processor", "sse avx2 avx512f avx512_bf16", "AMD EPYC, AVX-512 BF16"),
        ("AMD EPYC", "sse avx2", "AMD EPYC, AVX2"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "avx2 avx512f avx512_bf16 amx_bf16", "Intel Xeon, AMX"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "avx2 avx512f", "Intel Xeon, AVX-512"),
        ("arm", "", "arm"),
    ],
)
def test_kinds_of_processors(model_name, flags, kind):
    assert common.processor_kind(model_name, flags) == kind


def test_the_machine_is_read_from_cpuinfo(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: sse avx2\n\nprocessor\t: 1\n")
    assert common.machine(tmp_path / "cpuinfo")["processor_kind"] == "AMD EPYC, AVX2"


def test_no_table_is_written_with_json_or_quick(tmp_path):
    page = tmp_path / "page.md"
    for extra in (["--json", str(tmp_path / "a.json")], ["--quick"], []):
        page.write_text("<!-- a:begin -->\n<!-- a:end -->\n")
        arguments = common.parser(None).parse_args(["--readme", str(page), *extra])
        common.finish({"figure": 1}, arguments, "a", "the table\n")
        assert ("the table" in page.read_text()) == (not extra)
    assert json.loads((tmp_path / "a.json").read_text())["figure"] == 1


def test_saved_steps_by_hand():
    """The random start reaches 4 half-way between steps 10 and 20, and never 1."""
    saved = closed_form_start.saved_steps({0: 6.0, 10: 5.0, 20: 3.0}, {0: 4.0, 10: 3.0, 20: 1.0})
    assert saved == {0: 15.0, 10: 10.0, 20: None}


def test_a_learning_curve_has_an_arm_for_each_change(tiny_lm, shapes, tmp_path):
    (tmp_path / "tiny.yaml").write_text(write_yaml(tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "run")))
    arms = ["--arm", "still=training.learning_rate=1e-12", "--arm", "short=training.optimizer=muon;training.ema=0.9"]
    report = learning_curve.main(["--recipe", str(tmp_path / "tiny.yaml"), "--quick", "--points", "2", *arms])
    own, still, _ = (report["curves"][name][0] for name in (learning_curve.AS_IT_IS, "still", "short"))
    assert [targets for targets, _ in own] == [0, 16, 32]
    assert own[0] == still[0]
    assert still[2][1] == pytest.approx(still[0][1], rel=1e-4)
    assert report["targets_to_loss"][learning_curve.AS_IT_IS] != [None]
    assert "| still | reached by 0 of 1 |" in learning_curve.markdown(report)


def test_a_probe_finds_what_features_hold_and_nothing_else():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(400, 8, generator=draw)
    truth = np.stack([features[:, 0].numpy() > 0.5, np.random.default_rng(0).random(400) < 0.3], axis=1)
    scores = linear_probe.probe(features[:300], features[300:], truth[:300], truth[300:])
    assert scores["average_precision"][0] > 0.98
    assert scores["average_precision"][1] < 0.5
    assert scores["f1"][0] > 0.9


def test_words_of_captions_by_hand():
    references = [["A dog runs", "Two dogs .", "a cat"], ["a hotdog", "A dog", "people"]]
    assert linear_probe.labels_of(references, ["dog dogs", "cat"]).tolist() == [[True, False], [False, False]]
    assert linear_probe.f1_score(np.array([True, True, False]), np.array([True, False, True])) == 0.5


def test_the_probe_runs_beside_captions(tiny_lm, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(linear_probe, "WORDS", {"colours": ["red", "blue"], "things": ["circle"]})
    data = tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "run")
    data["data"]["train"] = data["data"]["train"][:1]
    (tmp_path / "tiny.yaml").write_text(write_yaml(data))
    captions = [
        {"id": json.loads(line)["image"], "model": "a red circle"} for line in (shapes / "captions.jsonl").open()
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    options = ["--quick", "--least", "1", "--predictions", str(tmp_path / "said.jsonl")]
    report = linear_probe.main([str(tmp_path / "tiny.yaml"), *options])
    assert {row["word"] for row in report["words"]} <= {"red", "blue", "circle"}
    assert all(0 <= row["captions_f1"] <= 1 for row in report["words"])
    assert "| things |" in linear_probe.markdown(report)


def test_a_blind_twin_sees_nothing(tiny_lm, shapes, tmp_path):
    """Both are trained once; the twin answers the same whatever it is shown."""
    data = tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "seeing")
    data["data"]["validation"] = [{"type": "qa", "path": str(shapes), "split": "val"}]
    (tmp_path / "tiny.yaml").write_text(write_yaml(data))
    arguments = [str(tmp_path / "tiny.yaml"), "--quick", "training.max_steps=2"]
    report = blind_twin.main(arguments)
    assert report["difference"]["exact_match"]["a"] == report["blind_twin"]["exact_match"]
    assert report["difference"]["exact_match"]["b"] == report["metrics"]["exact_match"]
    assert "| exact_match |" in blind_twin.markdown(report)
    rows = (tmp_path / "seeing_blind" / "last" / "predictions_vqa_recipe_validation.jsonl").read_text().splitlines()
    assert all(row["model"] == row["shuffled"] for row in map(json.loads, rows))
    before = (tmp_path / "seeing" / "log.jsonl").read_text()
    assert blind_twin.main(arguments)["metrics"] == report["metrics"]
    assert (tmp_path / "seeing" / "log.jsonl").read_text().count('"loss"') == before.count('"loss"')


def test_evidence_and_audit_run(tiny_checkpoint, shapes, tmp_path):
    where = ["--quick", "--checkpoint", str(tiny_checkpoint), "--data", str(shapes)]
    report = evidence.main([*where, "--json", str(tmp_path / "evidence.json")])
    assert json.loads((tmp_path / "evidence.json").read_text()) == report
    assert [point["coverage"] for point in report["curves"]["lowest evidence"]] == list(evidence.COVERAGES)
    assert "| floor |" in evidence.markdown(report)
    report = audit.main([*where, "--json", str(tmp_path / "audit.json")])
    assert report["captions"] == 12
    assert set(report["rankings"]) == {"evidence", "evidence per word", "log p of the caption"}
    assert "average precision" in audit.markdown(report)


def test_a_caption_is_true_if_the_references_say_its_words():
    references = ["Two dogs running on the grass", "A ball"]
    assert evidence.is_true("A dog runs with a ball.", references)
    assert not evidence.is_true("A red dog runs.", references)
    assert evidence.is_true("It is on the", references)


def test_average_precision_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn defines the truth")
    found = np.random.default_rng(0).random(50) < 0.2
    expected = metrics.average_precision_score(found, -np.arange(50))
    assert audit.average_precision(found) == pytest.approx(expected)


def test_experiments_add_up_the_runs_that_they_started_from(tmp_path):
    scores = {"bleu_4": 0.2, "cider_d": 0.5, "shuffled_cider_d": 0.05, "loss": 2.5, "evidence": 0.7}
    first = {"name": "a", "starts_from": None, "minutes": 30.0, "captions": 4000, "trained": 7_200_000, **scores}
    first["processor"] = "one"
    first |= {"images": 10, "distinct": 9, "most_frequent": 0.2, "words": 9.5}
    then = first | {"name": "b", "starts_from": "a", "minutes": 12.0, "captions": 500, "cider_d": 0.45}
    (tmp_path / "log").mkdir()
    for run in (first, then):
        (tmp_path / "log" / f"{run['name']}.json").write_text(json.dumps(run))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- experiments:begin -->\n<!-- experiments:end -->\nafter")
    experiments.main([], folder=tmp_path / "log", page=page)
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| [")]
    assert [row[0][3] for row in rows] == ["b", "a"], "the best one last"
    assert rows[0][1:4] == ["42", "4,500", "7.2 M"]
    assert rows[1][1:3] == ["30", "4,000"]


def test_experiments_read_the_validation_of_the_best_checkpoint():
    log = [
        {"step": step, "validation/loss": loss, "validation/shuffled_loss": 3.0} for step, loss in enumerate((2, 1.5))
    ]
    assert experiments.validation_at([{"step": 0}, *log], 0) == {"loss": 2, "evidence": 1.0}
    assert experiments.validation_at(log, 5) == {}
