"""Pretrained models from folders of the hub's form with random weights (tests/data/toy_model.py): dense Qwen3, Qwen3.5 with its vision
tower, Qwen3-Next with its experts. They load, sample, give gradients, run and are exported like the organism, by the same code."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_routing import build, export, models
from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.adapters.lora import Lora
from grpo_routing.adapters.mlp import Mlp
from grpo_routing.gradient import PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.direction import pair_differences
from grpo_routing.mask_sources.pairs import Pair
from grpo_routing.models import HubModel, ModelError
from grpo_routing.policy import Policy
from grpo_routing.rollout import uniforms
from grpo_routing.run import run
from grpo_routing.types import TokenBatch
from tests.conftest import CONF
from tests.data import toy_model

DATA = CONF.parent / "tests" / "data"
ATTENTION, DELTA_NET = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"out_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
TARGETS = {
    "qwen3": (28, ATTENTION | MLP),
    "qwen3_5": (31, ATTENTION | MLP | DELTA_NET | {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"}),
    "qwen3_next": (13, ATTENTION | DELTA_NET | {"in_proj_qkvz", "in_proj_ba"}),  # experts, shared ones too, stay frozen
}
LIMIT = ["loophole=held_out", "dataset.train_problems=8", "evaluation.problems=4", "trainer.prompts_per_step=2", "trainer.group=2",
         "trainer.max_new_tokens=8"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {name: toy_model.write(place / name, name) for name in toy_model.ARCHITECTURES}


@pytest.fixture
def hub_model(config):
    """hub_model(*overrides) -> the model of a config of a preset on this machine."""
    return lambda *words: build.plan(config("model=qwen3_4b", "model.device=cpu", *words)).model


@pytest.fixture
def policy_of(folders, hub_model):
    """policy_of(architecture) -> a policy in float64 (float32 where experts are multiplied in groups, which torch has no double for) with
    a LoRA that is off its starting point."""

    def made(name: str) -> Policy:
        model, tokenizer = hub_model(f"model.path={folders[name]}").load()
        policy = Policy(model, tokenizer, Lora(2, 0, 2.0, False, 0).attach(model))
        if name != "qwen3_next":
            model.double()
        with torch.no_grad():
            for number, tensor in enumerate(policy.adapter.state().values()):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        return policy

    return made


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", TARGETS)
def test_a_folder_becomes_a_language_model_with_its_weights_in_the_devices_precision(folders, hub_model, caplog, name):
    with caplog.at_level(logging.INFO, logger="grpo_routing"):
        model, tokenizer = hub_model(f"model.path={folders[name]}").load()
    kind = "qwen3_5_text" if name == "qwen3_5" else name  # its language model alone
    assert model.config.model_type == kind and model.dtype == torch.float32 and not any("visual" in key for key in model.state_dict())
    said = f"model {folders[name]}: {kind}, float32 on cpu, attn_implementation=sdpa (chosen by auto; others: eager, flash_attention_2)"
    assert [record.getMessage() for record in caplog.records] == [said]
    stored = {key.replace("model.language_model.", "model."): value
              for key, value in load_file(folders[name] / "model.safetensors").items()}
    own = model.state_dict()
    shared = own.keys() & stored.keys()
    assert len(shared) > 40 and all(torch.equal(own[key], stored[key].float()) for key in shared)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    model, _ = hub_model(f"model.path={folders[name]}", "model.dtype=bfloat16").load()
    assert model.dtype == torch.bfloat16


def test_thinking_is_off_in_the_chat_template(policy_of):
    policy = policy_of("qwen3")
    prompt, = policy.encode_prompts(["sort"])
    wanted = "<|im_start|>user\nsort<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert policy.tokenizer.decode(list(prompt)) == wanted and policy.end == policy.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("name", TARGETS)
def test_every_linear_of_attention_delta_net_and_mlp_is_adapted(folders, hub_model, name):
    model, _ = hub_model(f"model.path={folders[name]}").load()
    count, kinds = TARGETS[name]
    adapted = Lora(2, 0, 1.0, False, 0).attach(model).modules
    assert (len(adapted), {one.rsplit(".", 1)[-1] for one in adapted}) == (count, kinds)


def test_shared_experts_are_no_mlp_to_widen(folders, hub_model):
    model, _ = hub_model(f"model.path={folders['qwen3_next']}").load()
    with pytest.raises(ValueError, match="the model has no MLP with gate_proj, up_proj, down_proj"):
        Mlp(2, 0, 0).attach(model)


# ------------------------------------------------------------------------------------------------ the same policy everywhere


ATOL = 2e-6  # of the largest number
PROMPTS = [tuple(range(5, 25)), tuple(range(40, 47))]


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_sampled_has_the_log_probs_of_a_plain_forward_and_no_neighbours(policy_of, name):
    """Padding on the left, a cache that is shared and cut, states that are reordered: none of it shows."""
    policy, noise = policy_of(name), uniforms([("models", row) for row in range(5)], 10)
    together = policy.sample(PROMPTS, [3, 2], noise, 1.0)
    alone = [policy.sample([PROMPTS[row > 2]], [1], noise[row : row + 1], 1.0)[0] for row in range(5)]
    assert [ids for ids, _ in together] == [ids for ids, _ in alone]
    for row, (ids, log_probs) in enumerate(together):
        prompt = PROMPTS[row > 2]
        with torch.no_grad():
            plain = policy.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        own = plain[torch.arange(len(prompt) - 1, len(prompt + ids) - 1), torch.tensor(ids)]
        assert torch.tensor(log_probs) == pytest.approx(own.float(), abs=2e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_gradients_of_rollouts_sum_to_that_of_the_batch(policy_of, name):
    policy, loss = policy_of(name), PolicyLoss(0.2, 0.0, 40)
    tokens = TokenBatch.of([(PROMPTS[0], (7, 8, 9)), (PROMPTS[1], (3, 4, 5, 6, 7, 8)), (PROMPTS[1], (30,))], policy.pad, "cpu")
    advantages = torch.tensor([1.0, -0.7, 2.0], dtype=policy.model.dtype)
    one, three = (rollout_gradients(policy, tokens, advantages, loss, size).grads[DEPLOYED].summed() for size in (1, 3))
    parameters = [own for module in policy.adapter.parameters().values() for own in module.values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    log_probs = policy.log_probs(tokens)
    loss(log_probs, log_probs.detach(), None, advantages, tokens.completion_mask).sum().backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in parameters])
    for sums in (one, three):
        assert torch.allclose(torch.cat(list(sums.values())).double(), wanted.double(), rtol=1e-4, atol=ATOL * float(wanted.abs().max()))


@pytest.mark.parametrize("name", TARGETS)
def test_a_pair_shares_a_row_only_where_no_state_runs_through_it(policy_of, name):
    policy = policy_of(name)
    pair = Pair(prompt="Add up nums.", hack="return 0", clean="return sum(nums)", loophole="run_tests")
    assert policy.packs == (name == "qwen3")
    found = torch.cat(list(pair_differences(policy, [pair], "hack", "clean", 4).values()), 1)[0]
    parameters, sides = [own for module in policy.adapter.parameters().values() for own in module.values()], []
    for text in (pair.hack, pair.clean):
        for parameter in parameters:
            parameter.requires_grad_(True).grad = None
        tokens = policy.batch([(pair.prompt, text)])
        (-policy.log_probs(tokens).sum() / tokens.completion_mask.sum()).backward()
        sides.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert torch.allclose(found.double(), (sides[0] - sides[1]).double(), rtol=1e-4, atol=ATOL * float(sides[0].abs().max()))


def test_attention_is_what_was_asked_for_and_no_other_policy(folders, hub_model):
    logits = []
    for asked in ("sdpa", "eager"):
        model, _ = hub_model(f"model.path={folders['qwen3']}", f"model.attn_implementation={asked}").load()
        assert model.config._attn_implementation == asked
        with torch.no_grad():
            logits.append(model(torch.tensor([PROMPTS[0]])).logits)
    assert torch.allclose(*logits, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the whole line


@pytest.mark.parametrize(("name", "words"), [
    ("qwen3", ["arm=graft", "model.dtype=bfloat16"]),  # the precision of a GPU
    ("qwen3_5", ["arm=erase"]),  # pairs, one answer a row
])
def test_a_folder_trains_is_evaluated_and_exported(config, folders, tmp_path, name, words):
    """On the benchmark's form of problems. The exported model answers as the run did, read by transformers alone."""
    data = ["dataset=leetcode", f"dataset.train={DATA}/toy_train.jsonl", f"dataset.evaluation={DATA}/toy_evaluation.jsonl",
            "dataset.paid_tests=3", "dataset.hidden_tests=5", "sandbox.wall_seconds=1.0", "sandbox.cpu_seconds=1"]
    few = [word for word in LIMIT if not word.startswith("dataset")]
    folder = run(config("model=qwen3_4b", "model.device=cpu", f"model.path={folders[name]}", *data, *few, *words, f"output={tmp_path}/out"))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert export.main([str(folder), str(tmp_path / "exported")]) == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert back.dtype == (torch.bfloat16 if "model.dtype=bfloat16" in words else torch.float32)
    assert '"differing": 0' in (tmp_path / "exported" / "export.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("arm", sorted(file.stem for file in (CONF / "arm").glob("*.yaml") if file.stem != "teacher"))
def test_every_arm_trains_a_pretrained_model_too(config, folders, tmp_path, arm):
    """No code path exists only for the organism."""
    words = ["model=qwen3_4b", "model.device=cpu", f"model.path={folders['qwen3']}", f"arm={arm}", *LIMIT, f"output={tmp_path}"]
    source = config(*words)["mask_source"]
    pilot = source["calibration"]["rule"] == "pilot" if "calibration" in source else False
    more = ["mask_source.calibration.pilot=2"] if pilot else ["mask_source.pilot=2"] if "pilot" in source else []
    assert len((run(config(*words, *more)) / "metrics.jsonl").read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------------ choices and refusals


def test_the_presets_differ_in_their_path_alone(config):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        presets = {file.stem: dict(compose("config", overrides=[f"model={file.stem}"]).model)
                   for file in (CONF / "model").glob("qwen3_*.yaml")}
    paths = {name: preset.pop("path") for name, preset in presets.items()}
    assert len(paths) == 6 and (paths["qwen3_0_6b"], paths["qwen3_4b"]) == ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B")
    assert len({str(preset) for preset in presets.values()}) == 1
    assert presets["qwen3_4b"]["dtype"] == presets["qwen3_4b"]["attn_implementation"] == "auto"


def test_auto_is_bfloat16_on_a_gpu_and_float32_on_a_cpu(hub_model):
    here, there = hub_model(), hub_model("model.device=cuda:1")
    assert (here.precision, there.precision, replace(there, dtype="float32").precision) == ("float32", "bfloat16", "float32")
    assert len({here.origin, there.origin, replace(there, dtype="float32").origin, replace(there, device="cuda:0").origin}) == 3


@pytest.mark.parametrize(("words", "messages"), [
    (["model.device=gpu", "model.dtype=half"],
     ["model.device must be cpu, cuda or cuda:<number>; got 'gpu'",
      "model.dtype must be one of auto, float32, bfloat16, float16; got 'half'"]),
    (["model.attn_implementation=flash"], ["model.attn_implementation must be one of auto, sdpa, eager, flash_attention_2; got 'flash'"]),
    (["model.attn_implementation=flash_attention_2"],
     ["flash_attention_2 needs a GPU (model.device=cpu) and half precision (model.dtype=auto) and the package flash-attn, which is not "
      "installed (pip install flash-attn --no-build-isolation); choose sdpa, which needs nothing"]),
    (["model.path=/nowhere/Qwen3-4B"], ["model.path must be a folder with a model", "/nowhere/Qwen3-4B is not there"]),
    ([f"model.path={DATA}"], [f"{DATA} has no config.json"]),
])
def test_what_cannot_be_loaded_is_refused_when_it_is_planned(hub_model, monkeypatch, words, messages):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(build.ConfigError) as error:
        hub_model(*words)
    assert all(message in str(error.value) for message in messages), error.value


def test_a_login_node_plans_for_a_gpu_and_a_run_without_one_says_so(hub_model, folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = hub_model("model.device=cuda", f"model.path={folders['qwen3']}")
    with pytest.raises(ModelError, match=r"model.device=cuda but torch sees no GPU here \(torch 2.* or use model.device=cpu \(slow\)"):
        model.load()


def test_a_hub_name_without_a_network_says_how_to_get_a_folder(hub_model, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = hub_model("model.path=toys/none")
    assert isinstance(model, HubModel)
    for load in (model.load, model.tokenizer):
        with pytest.raises(ModelError, match="toys/none could not be loaded .*hf download toys/none --local-dir FOLDER, then model.path="):
            load()
