"""`entra.doctor` and `entra doctor`: what is right passes, each thing that is wrong is named with its remedy, and what it says
about training is what trainers then do."""

import importlib.metadata
import re
import sys

import pytest
import torch
from tiny_models import VOCABULARY, build
from tiny_tokenizer import build_tokenizer
from torch import nn

import entra
import entra.capture
import entra.rollout
from entra.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def states(diagnosis):
    return {finding.name: finding.state for finding in diagnosis.findings}


def text_of(diagnosis, name):
    return "\n".join(finding.text for finding in diagnosis.findings if finding.name == name)


def wrong(diagnosis):
    """The one thing that is wrong."""
    assert not diagnosis.ok
    (finding,) = diagnosis.wrong
    return finding


def linear_only():
    """A model without a layer of softmax attention."""
    return build("qwen3_next", layer_types=["linear_attention"] * 4)


@pytest.mark.parametrize(
    ("family", "dtype", "layer"),
    [
        (
            "qwen3",
            torch.float32,
            "layers.1.self_attn, index 1 of 2 layers, full_attention: 4 query heads, 2 kv heads, head dim 20",
        ),
        ("mistral", torch.bfloat16, "index 1 of 2 layers, sliding_attention: 4 query heads, 2 kv heads, head dim 20, window 5"),
        ("gemma2", torch.float32, "index 1 of 3 layers, full_attention: 4 query heads, 2 kv heads, head dim 20, softcap 2"),
        ("gpt_oss", torch.bfloat16, "index 1 of 3 layers, full_attention: 4 query heads, 2 kv heads, head dim 20, sinks"),
        ("deepseek_v3", torch.float32, "index 1 of 2 layers, full_attention: 4 query heads, 4 kv heads, head dim 20"),
    ],
)
def test_a_model_that_works_passes_and_its_layer_is_told(family, dtype, layer):
    diagnosis = entra.doctor(build(family).to(dtype), build_tokenizer())
    assert diagnosis.ok, diagnosis
    assert layer in text_of(diagnosis, "layer")
    assert text_of(diagnosis, "backend").startswith(f"torch on cpu, {str(dtype).removeprefix('torch.')}, ")
    checked = {"versions", "tokenizer", "capture", "layer", "backend", "log-probs", "attention", "kernels", "layout", "cost"}
    assert {name for name, state in states(diagnosis).items() if state == "ok"} == checked


def test_the_model_is_as_before():
    model = build("gemma3", attention_dropout=0.3).train()
    model.model.layers[1].eval()

    def state():
        return [
            (
                name,
                module.training,
                id(getattr(module, "config", None)),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
            )
            for name, module in model.named_modules()
        ] + [model.config._attn_implementation, model.model.layers[1].self_attn.config._attn_implementation]

    before = state()
    assert entra.doctor(model).ok
    assert state() == before


def test_a_dynamic_rope_is_as_before():
    """The text of the self-check is longer than 16 tokens; transformers 5.3 then kept its frequencies for every later row."""
    model = stretched("dynamic")
    rotary = model.model.rotary_emb
    before, longest = rotary.inv_freq.clone(), rotary.max_seq_len_cached
    assert entra.doctor(model, build_tokenizer()).ok
    assert torch.equal(rotary.inv_freq, before)
    assert rotary.max_seq_len_cached == longest


def test_wrappers_are_looked_through():
    peft = pytest.importorskip("peft", reason="needs PEFT")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    assert entra.doctor(torch.compile(peft.get_peft_model(build("qwen3"), adapter), backend="eager")).ok


def test_without_a_tokenizer_random_ids_are_scored():
    diagnosis = entra.doctor(build("qwen3"))
    assert diagnosis.ok
    assert states(diagnosis)["tokenizer"] == "note"


def test_a_short_context_is_kept_to():
    model = build("llama", max_position_embeddings=24)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    assert entra.doctor(model, build_tokenizer()).ok
    assert max(seen) == 24


def test_a_model_that_cannot_be_captured_is_named_with_the_remedy():
    finding = wrong(entra.doctor(linear_only(), build_tokenizer()))
    assert finding.name == "capture"
    assert "linear_attention" in finding.text
    assert "score with another model" in finding.text


def test_an_unknown_logit_transform_is_named():
    class Doubled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, *args, **kwargs):
            output = self.model(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

        def get_output_embeddings(self):
            return self.model.get_output_embeddings()

        def get_input_embeddings(self):
            return self.model.get_input_embeddings()

    finding = wrong(entra.doctor(Doubled(build("qwen3"))))
    assert finding.name == "self-check"
    assert "logit_scale=1.0" in finding.text


def test_attention_that_is_not_the_models_own_is_found_against_eager():
    """As where SDPA left Gemma 2's softcap out: q and k are right, what attention does with them is not."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def twice_as_sharp(module, query, *args, **kwargs):
        return sdpa_attention_forward(module, 2 * query, *args, **kwargs)

    AttentionInterface.register("entra_test_twice_as_sharp", twice_as_sharp)
    model = build("qwen3")
    model.config._attn_implementation_internal = "entra_test_twice_as_sharp"
    diagnosis = entra.doctor(model, build_tokenizer())
    assert "log-probs" in {finding.name for finding in diagnosis.wrong}
    assert "attn_implementation='eager'" in text_of(diagnosis, "log-probs")


@pytest.mark.parametrize(
    ("fault", "names"),
    [(lambda mu: 1.001 * mu, {"attention", "kernels"}), (lambda mu: mu.roll(1, -1), {"attention", "kernels"})],
    ids=["scaled", "shifted"],
)
def test_a_wrong_kernel_is_found(monkeypatch, fault, names):
    right = entra.capture.incoming_attention
    monkeypatch.setattr(entra.capture, "incoming_attention", lambda *args, **kwargs: fault(right(*args, **kwargs)))
    diagnosis = entra.doctor(build("qwen3"), build_tokenizer())
    assert {finding.name for finding in diagnosis.wrong} == names
    assert "ScoreConfig(backend='torch')" in text_of(diagnosis, "kernels")


def test_a_backend_that_cannot_run_is_named():
    finding = wrong(entra.doctor(build("qwen3").double(), config=entra.ScoreConfig(backend="triton")))
    assert "backend='triton' has no float64; use backend='torch'" in finding.text


def test_a_version_outside_ours_is_named_with_the_command(monkeypatch):
    asked = ["transformers>=99,<100", "numpy", "trl>=1; extra == 'train'", "not-installed>=3"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    finding = wrong(entra.doctor(build("qwen3")))
    assert finding.name == "versions"
    assert re.search(r"transformers \S+ is outside <100,>=99; pip install 'transformers<100,>=99'", finding.text)


def test_versions_that_cannot_be_checked_are_noted(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", nothing)
    diagnosis = entra.doctor(build("qwen3"))
    assert diagnosis.ok
    (note,) = (finding for finding in diagnosis.findings if finding.name == "versions" and finding.state == "note")
    assert "entra-reward is not installed" in note.text
    assert "pip install -e ." in note.text


def test_files_of_the_other_project_among_ours_are_wrong(monkeypatch):
    monkeypatch.setattr(
        sys.modules["entra.diagnosis"], "name_clash", lambda: "another project; run pip uninstall entra", raising=False
    )
    finding = wrong(entra.doctor(build("qwen3")))
    assert finding == ("versions", "wrong", "another project; run pip uninstall entra")


def test_a_model_of_none_is_refused():
    with pytest.raises(TypeError, match="model=None must be a transformers causal LM"):
        entra.doctor(None)


def test_time_of_a_batch_and_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["entra.diagnosis"], "_seconds", lambda model, ids, config: len(ids) / 1_000)
    model = build("qwen3")
    diagnosis = entra.doctor(model, build_tokenizer(), args=arguments(tmp_path, max_completion_length=256))
    mebibytes = sum(weight.numel() * 4 for weight in model.parameters()) / 2**20
    speed, batch = text_of(diagnosis, "cost").splitlines()
    # 1,024 tokens of six hidden states of 48 and three products of 64 numbers, 4 bytes each.
    assert (
        speed
        == f"1 s for 1,000 tokens in rows of 256; weights {mebibytes:.3g} MiB, a forward of 1,024 tokens about 1.88 MiB more"
    )
    seconds = float(re.match(r"about (\S+) s for each generated batch of 8 rows with 256 new tokens", batch)[1])
    assert 8 * 0.273 <= seconds < 2 * 8 * 0.273  # 17 tokens of a prompt come before; attention makes it a little more


# Training: what is said against what a trainer does.


def arguments(tmp_path, kind="GRPOConfig", **options):
    trl = pytest.importorskip("trl", reason="needs TRL")
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return getattr(trl, kind)(**{**defaults, **options})


CASES = {
    "defaults": ({}, {}, {}, "gradient_accumulation_steps=2 is a multiple of steps_per_generation * num_iterations = 2"),
    "iterations": ({"num_iterations": 2}, {}, {}, None),
    "misaligned": ({"gradient_accumulation_steps": 1}, {}, {}, None),
    "rloo": ({"kind": "RLOOConfig", "beta": 0.0}, {}, {}, None),
    "temperature": ({"num_iterations": 2, "temperature": 0.7}, {}, {}, "temperature=0.7"),
    "dropout": ({"num_iterations": 2}, {"attention_dropout": 0.5}, {}, "dropout"),
    "sequence": ({"num_iterations": 2}, {}, {"ranking_scope": "sequence"}, "ranking_scope='sequence'"),
}


@pytest.fixture
def own_forwards(monkeypatch):
    """One entry for each time that scoring runs a forward of its own."""
    calls, original = [], entra.rollout.token_signals

    def spy(*arguments, **kwargs):
        calls.append(1)
        return original(*arguments, **kwargs)

    monkeypatch.setattr(entra.rollout, "token_signals", spy)
    return calls


@pytest.mark.parametrize("case", CASES)
def test_whether_scores_ride_is_what_a_trainer_then_does(tmp_path, own_forwards, case):
    trl = pytest.importorskip("trl", reason="needs TRL")
    from datasets import Dataset

    options, overrides, method, reason = CASES[case]
    args, model, config = arguments(tmp_path, **options), build("qwen3", **overrides), entra.ScoreConfig(**method)
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    diagnosis = entra.doctor(model, tokenizer, args=args, config=config)
    assert diagnosis.ok, diagnosis
    said = text_of(diagnosis, "training")
    assert ("scores ride on TRL's own log-prob pass" in said) == (reason is None)
    assert (reason or "no forward is added") in said
    assert ("as TRL's pass" in text_of(diagnosis, "layout")) == (reason is None)

    own_forwards.clear()
    trainer = (entra.EntraRLOOTrainer if isinstance(args, trl.RLOOConfig) else entra.EntraGRPOTrainer)(
        model=model,
        reward_funcs=[entra.EntraReward(config=config, gate=lambda completions, **columns: [1.0] * len(completions))],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"{i}="} for i in range(8)]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert (own_forwards == []) == (reason is None)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=64, **no_dropout))


def stretched(kind, **parameters):
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **parameters}
    return build("llama", rope_parameters=parameters, max_position_embeddings=16)


FACTORS = {"short_factor": [1.0] * 10, "long_factor": [1.0 + 0.5 * i for i in range(10)]}
BUT_FOR = {
    "learned": (gpt2, "shorter than the batch's longest (this model reads the pads"),
    "longrope": (
        lambda: stretched("longrope", original_max_position_embeddings=16, **FACTORS),
        "padded to more than 16 tokens",
    ),
    "dynamic": (lambda: stretched("dynamic"), "padded to more than 16 tokens"),
}


@pytest.mark.parametrize("case", BUT_FOR)
def test_rows_that_do_not_ride_are_told_as_a_trainer_then_finds_them(tmp_path, own_forwards, case):
    pytest.importorskip("trl", reason="needs TRL")
    from datasets import Dataset

    model, text = BUT_FOR[case][0](), BUT_FOR[case][1]
    for longer, rides in ((2, True), (14, False)):
        args = arguments(tmp_path, num_iterations=2)
        tokenizer = build_tokenizer()
        tokenizer.padding_side = "left"
        said = text_of(entra.doctor(model, tokenizer, args=args), "training")
        assert said.startswith("scores ride on TRL's own log-prob pass, no forward is added but for ")
        assert text in said
        own_forwards.clear()
        entra.EntraGRPOTrainer(
            model=model,
            reward_funcs=[entra.EntraReward(gate=lambda completions, **columns: [1.0] * len(completions))],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "1="}, {"prompt": "1" * (longer - 1) + "="}]),
            processing_class=tokenizer,
        ).train()
        assert (own_forwards == []) == rides


def test_a_rope_that_no_length_changes_is_not_told(tmp_path):
    model = build("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    said = text_of(entra.doctor(model, build_tokenizer(), args=arguments(tmp_path, num_iterations=2)), "training")
    assert said == "scores ride on TRL's own log-prob pass, no forward is added"


def test_vllm_with_its_correction_rides(tmp_path):
    """`tests/entra/test_vllm.py` trains so; here nothing generates."""
    for correction, rides in ((True, True), (False, False)):
        args = arguments(tmp_path)
        args.use_vllm, args.vllm_importance_sampling_correction = True, correction
        said = text_of(entra.doctor(build("qwen3"), build_tokenizer(), args=args), "training")
        assert ("scores ride" in said) == rides


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_weights": [0.0, 0.0]}, "are all zero"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "Set fsdp_version: 2"),
    ],
)
def test_training_arguments_that_a_trainer_refuses(tmp_path, options, message):
    finding = wrong(entra.doctor(build("qwen3"), build_tokenizer(), args=arguments(tmp_path, **options)))
    assert finding.name == "training"
    assert message in finding.text


def test_a_tokenizer_without_eos_is_wrong_for_training_alone(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    assert entra.doctor(build("qwen3"), tokenizer).ok
    finding = wrong(entra.doctor(build("qwen3"), tokenizer, args=arguments(tmp_path)))
    assert finding.name == "tokenizer"
    assert "set tokenizer.eos_token" in finding.text


# The command.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a model that works and of one that does not."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("right", build("llama")), ("linear", linear_only())):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    return folder


def test_the_command_ends_with_0_when_all_is_right(folders, capsys):
    assert main(["doctor", "--model", str(folders / "right")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines} >= {"versions", "capture", "layer", "backend", "log-probs", "attention", "cost"}
    assert {line.split()[0] for line in lines} == {"ok", "note"}


def test_the_command_ends_with_1_when_something_is_wrong(folders, capsys):
    assert main(["doctor", "--model", str(folders / "linear")]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"^wrong +capture +no layer of this model", out, re.MULTILINE)
    assert err.endswith("entra doctor: capture: wrong, see above\n")


def test_the_command_takes_the_options_of_a_training(folders, capsys, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs TRL")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("num_iterations: 2\noutput_dir: run\nmodel_name_or_path: another\nreport_to: none\n")
    assert main(["doctor", "--model", str(folders / "right"), "--config", "run.yaml"]) == 0
    assert "scores ride on TRL's own log-prob pass" in capsys.readouterr().out
    assert main(["doctor", "--model", str(folders / "right"), "--config", "run.yaml", "--temperature", "0.7"]) == 0
    assert "costs one no-grad forward" in capsys.readouterr().out
    assert main(["doctor", "--model", str(folders / "right"), "--dtype", "bfloat16", "--attn_implementation", "eager"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM with eager attention" in out
    assert "torch on cpu, bfloat16" in out
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_the_command_names_a_model_that_cannot_be_loaded(capsys, tmp_path):
    assert main(["doctor", "--model", str(tmp_path / "nothing")]) == 2
    assert "cannot load --model" in capsys.readouterr().err


def test_the_command_prints_nothing_that_moves_the_cursor(folders, capsys, monkeypatch):
    doctor = sys.modules["entra.diagnosis"]
    diagnosis = doctor.Diagnosis(findings=(doctor.Finding("layer", "ok", "model.\x1b[2Jlayers"),))
    monkeypatch.setattr(doctor, "doctor", lambda *args, **kwargs: diagnosis)
    assert main(["doctor", "--model", str(folders / "right")]) == 0
    assert "\x1b" not in capsys.readouterr().out
