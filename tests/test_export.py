"""Claims about export: the files alone are the deployed policy, with its numbers; nothing of the quarantine is in them; what no export can
say exactly is refused, and then nothing is left."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo_routing import build, export, export_check
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.adapters.lora import LoraLinear
from grpo_routing.adapters.svd import decompose
from grpo_routing.checkpoint import save_checkpoint
from grpo_routing.export_card import portable
from grpo_routing.finished import UnusableRun, load
from grpo_routing.folder import frozen
from grpo_routing.run import run
from grpo_routing.train import State

ADAPTERS = {"lora": ["adapter.quarantine_rank=4"], "svd": ["adapter.axes=disjoint"], "mlp": ["adapter.quarantine_width=4"]}
SMALL = ["loophole=held_out", "dataset.train_problems=8", "evaluation.problems=8", "trainer.prompts_per_step=2", "trainer.group=2",
         "experiment_name=e"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def moved_run(config: dict) -> Path:
    """A finished run whose blocks really do something: parameters are drawn, then it is evaluated as every run is."""
    folder = run(config)
    loaded = load(folder)
    with torch.no_grad():
        for number, tensor in enumerate(loaded.policy.adapter.state().values()):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    state = State(loaded.plan.optimizer.start(loaded.policy.adapter))
    state.step = loaded.plan.trainer.steps
    save_checkpoint(folder / "checkpoints", loaded.policy.adapter, state)
    for file in (*(folder / "eval").glob("as_*.json"), folder / "status.json"):
        file.unlink()
    return run(config)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> dict[str, Path]:
    """A run of each adapter, with a quarantine; tests copy what they change."""
    output = tmp_path_factory.mktemp("export")
    return {name: moved_run(config(f"adapter={name}", *words, *SMALL, f"output={output}")) for name, words in ADAPTERS.items()}


def exported(folder: Path, out: Path, *words: str) -> Path:
    assert export.main([str(folder), str(out), *words]) == 0
    return out


@pytest.fixture(scope="module")
def unsampled(finished, tmp_path_factory):
    """unsampled(adapter, form) -> an export without its evaluation, made once; tests do not change it."""
    place = tmp_path_factory.mktemp("exports")
    made = cache(lambda adapter, form: exported(finished[adapter], place / f"{adapter}-{form}", "--format", form, "--no-evaluate"))
    return lambda adapter, form="merged": made(adapter, form)


def refused(capsys, folder: Path, out: Path, *words: str) -> str:
    """What export says when it refuses; it leaves nothing."""
    before = sorted(out.parent.iterdir()) if out.parent.exists() else []
    assert export.main([str(folder), str(out), *words]) == 2
    assert (sorted(out.parent.iterdir()) if out.parent.exists() else []) == before
    return capsys.readouterr().err


def states(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's parameters in the newest checkpoint, by file."""
    place = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
    return {name.removeprefix("adapter/"): value for name, value in load_file(place / "state.safetensors").items()
            if name.startswith("adapter/")}


# ------------------------------------------------------------------------------------------------ the round trip


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_files_are_the_deployed_policy_with_its_answers_and_rates(finished, tmp_path, capsys, adapter):
    folder, out = finished[adapter], exported(finished[adapter], tmp_path / "out")
    said, before = json.loads((out / "export.json").read_text()), json.loads((folder / "eval" / "as_deployed.json").read_text())
    assert said["evaluated"] == {"rates": {**before["rates"]}, "asked": 8, "differing": 0}
    assert 0 <= said["log_probs"]["difference"] < 1e-4 and said["log_probs"]["answers"] == 8 and said["log_probs"]["tokens"] > 8
    assert "all 8 answers are those of the run" in capsys.readouterr().out
    trained = json.loads((folder / "eval" / "as_trained.json").read_text())
    assert [row["completion"] for row in trained["rows"]] != [row["completion"] for row in before["rows"]]  # so the quarantine did matter

    model, policy = AutoModelForCausalLM.from_pretrained(out), load(folder).policy
    assert type(model).__module__ == "transformers.models.qwen3.modeling_qwen3" and model.dtype == torch.float32
    ids = torch.arange(3, 40)[None]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad(), policy.adapter.only(DEPLOYED):
        assert torch.allclose(model(ids).logits, policy.model(ids).logits, atol=1e-4)
        with policy.adapter.merged():
            assert torch.equal(model(ids).logits, policy.model(ids).logits)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, policy.model(ids).logits, atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tuple(tokenizer("class Solution:\n    def f(self, xs):").input_ids) == policy.encode("class Solution:\n    def f(self, xs):")
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["temperature"]) == (policy.end, policy.pad, 1.0)
    assert model.generate(ids, attention_mask=torch.ones_like(ids)).shape[1] <= ids.shape[1] + 12


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_weights_are_the_base_and_the_block_by_hand(finished, unsampled, adapter):
    """From the checkpoint's tensors and the papers' formulas, in float64."""
    out, plan = unsampled(adapter), build.plan(frozen(finished[adapter]))
    weights, own = load_file(out / "model.safetensors"), states(finished[adapter])
    before = plan.model.load()[0].state_dict()
    changed = {name for name in weights if weights[name].shape != before[name].shape or not torch.equal(weights[name], before[name])}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")[4 if adapter == "mlp" else 0 :]
    assert {name.rsplit(".", 2)[-2] for name in changed} == set(kinds) and len(changed) == 2 * len(kinds)
    for name in changed:
        module, old = name.removesuffix(".weight"), before[name].double()
        if adapter == "lora":
            wanted = old + 2.0 * own[f"deployed/{module}/B"].double() @ own[f"deployed/{module}/A"].double()
        elif adapter == "svd":
            u, vh = decompose(before[name], Path(plan.adapter.cache))
            wanted = old + u[:, 0::2].double() @ torch.diag(own[f"deployed/{module}/dS"].double()) @ vh[0::2].double()
        else:
            block, _, part = module.rpartition(".")
            wanted = torch.cat([old, own[f"deployed/{block}/{part.removesuffix('_proj')}"].double()], 1 if part == "down_proj" else 0)
        assert weights[name].shape == wanted.shape and torch.allclose(weights[name].double(), wanted, rtol=0, atol=1e-6), name
    said = json.loads((out / "config.json").read_text())
    assert said["intermediate_size"] == 64 + 16 * (adapter == "mlp")


def test_a_widened_mlp_says_how_wide_it_is(finished):
    adapter = load(finished["mlp"]).policy.adapter
    with adapter.only(DEPLOYED), adapter.merged():
        mlp = next(iter(adapter.modules.values())).plain()
    assert [mlp.intermediate_size, mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.down_proj.in_features] == [80] * 4
    assert [len(mlp.gate_proj.weight), len(mlp.up_proj.weight), mlp.down_proj.weight.shape[1]] == [80] * 3


# ------------------------------------------------------------------------------------------------ nothing of the quarantine


@pytest.mark.parametrize(("adapter", "form"), [*((name, "merged") for name in ADAPTERS), ("lora", "peft")])
def test_a_quarantine_of_nans_changes_no_byte_of_the_weights(finished, unsampled, tmp_path, adapter, form):
    spoilt = shutil.copytree(finished[adapter], tmp_path / finished[adapter].name)
    file = spoilt / "checkpoints" / (spoilt / "checkpoints" / "latest").read_text() / "state.safetensors"
    tensors = load_file(file)
    there = [name for name in tensors if name.startswith("adapter/quarantine/")]
    save_file({name: torch.full_like(value, torch.nan) if name in there else value for name, value in tensors.items()}, file)
    assert there and torch.isnan(load(spoilt).policy.adapter.state()[there[0].removeprefix("adapter/")]).all()
    outs = [exported(spoilt, tmp_path / "out", "--format", form, "--no-evaluate"), unsampled(adapter, form)]
    files = sorted(file.relative_to(outs[0]) for file in outs[0].rglob("*.safetensors"))
    assert files and all((outs[0] / file).read_bytes() == (outs[1] / file).read_bytes() for file in files)
    assert all(torch.isfinite(value).all() for file in files for value in load_file(outs[0] / file).values())


@pytest.mark.parametrize(("adapter", "form"), [*((name, "merged") for name in ADAPTERS), ("lora", "peft")])
def test_no_name_and_no_number_of_the_quarantine_is_stored(finished, unsampled, adapter, form):
    out = unsampled(adapter, form)
    secret = [value for name, value in states(finished[adapter]).items() if name.startswith(QUARANTINE)]
    numbers = torch.cat([value.flatten() for value in secret])
    stored = {name: value for file in out.rglob("*.safetensors") for name, value in load_file(file).items()}
    assert numbers.numel() > 100 and stored and all(bool(value.ne(0).any()) for value in secret)
    for name, value in stored.items():
        assert QUARANTINE not in name and "blocks" not in name and "frozen" not in name
        # the smallest tensor of a quarantine has 16 numbers; a few may meet by chance
        assert int(torch.isin(value.flatten(), numbers).sum()) < 12, name


def with_both_blocks(monkeypatch):
    """What a careless export would do."""
    settled = export.settled
    monkeypatch.setattr(export, "settled", lambda policy, *blocks: settled(policy, *([DEPLOYED, QUARANTINE] if blocks else [])))


def test_a_widened_mlp_that_kept_the_quarantine_is_refused(finished, tmp_path, monkeypatch, capsys):
    with_both_blocks(monkeypatch)
    assert "holds a part of the quarantine of" in refused(capsys, finished["mlp"], tmp_path / "out", "--no-evaluate")


@pytest.mark.parametrize("adapter", ["lora", "svd"])
def test_a_merge_of_both_blocks_is_refused_by_its_log_probs(finished, tmp_path, monkeypatch, capsys, adapter):
    with_both_blocks(monkeypatch)
    said = refused(capsys, finished[adapter], tmp_path / "out", "--no-evaluate")
    assert "expected log-probabilities within 0.001 of the run's deployed policy" in said and "nothing was left" in said


def test_a_part_is_found_whole_and_as_last_rows_or_columns():
    part = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    wide, long = torch.cat([torch.zeros(2, 3), part], 1), torch.cat([torch.zeros(3, 2), part])
    assert export_check.holds(part, part) and export_check.holds(wide, part) and export_check.holds(long, part)
    assert not export_check.holds(wide.flip(1), part) and not export_check.holds(part[:1], part) and not export_check.holds(part[0], part)


# ------------------------------------------------------------------------------------------------ PEFT's layout


def test_a_lora_in_pefts_layout_is_the_same_policy(finished, tmp_path, capsys):
    """W + (alpha / r) B A by hand from the files equals the merged export to the bit."""
    out, whole = (exported(finished["lora"], tmp_path / form, "--format", form) for form in ("peft", "merged"))
    said, tensors = json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")
    assert (said["peft_type"], said["r"], said["lora_alpha"], said["use_rslora"]) == ("LORA", 8, 16, False)
    assert said["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    base, merged = (load_file(place / "model.safetensors") for place in (out / "base", whole))
    plain, _ = build.plan(frozen(finished["lora"])).model.load()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in base.items())
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    assert len(tensors) == 2 * len(names) == 2 * 14 and all(name.startswith("base_model.model.model.layers.") for name in tensors)
    for name in base:
        module = name.removesuffix(".weight")
        a, b = (tensors[f"base_model.model.{module}.lora_{key}.weight"].clone() if module in names else None for key in "AB")
        wanted = base[name] if a is None else base[name] + said["lora_alpha"] / said["r"] * (b @ a)
        assert torch.equal(merged[name], wanted)
    before = json.loads((finished["lora"] / "eval" / "as_deployed.json").read_text())
    assert json.loads((out / "export.json").read_text())["evaluated"] == {"rates": before["rates"], "asked": 8, "differing": 0}
    assert AutoTokenizer.from_pretrained(out)("def f").input_ids == AutoTokenizer.from_pretrained(whole)("def f").input_ids
    assert "library_name: peft" in (card := (out / "README.md").read_text()) and 'from_pretrained(folder + "/base")' in card


def test_other_adapters_have_no_peft_layout(finished, tmp_path, capsys):
    for adapter in ("svd", "mlp"):
        assert f"has adapter={adapter}. Leave --format out" in refused(capsys, finished[adapter], tmp_path / "out", "--format", "peft")


# ------------------------------------------------------------------------------------------------ pretrained models


@pytest.mark.parametrize(("family", "adapter", "dtype"), [
    ("qwen2", "lora", "float32"), ("qwen2", "lora", "bfloat16"), ("llama", "mlp", "float32"), ("qwen3", "svd", "bfloat16")])
def test_other_models_go_through_the_hub_path(config, tmp_path, family, adapter, dtype):
    """A local folder in place of a hub name: biases, untied embeddings and chat template come along; bfloat16 stays bfloat16, of which an
    adapter in PEFT's layout is no part."""
    small, tokenizer = build.plan(config()).model.load()
    tokenizer.chat_template = TEMPLATE
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 48, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = {"qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)), "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
             "qwen3": lambda: small}[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ["model=qwen3_0_6b", f"model.path={tmp_path / 'base'}", "model.device=cpu", f"model.dtype={dtype}"]
    folder = moved_run(config(*words, f"adapter={adapter}", *ADAPTERS[adapter], *SMALL, f"output={tmp_path}"))
    out = exported(folder, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(out)
    assert back.config.model_type == family and str(back.dtype) == f"torch.{dtype}"
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert json.loads((out / "export.json").read_text())["evaluated"]["differing"] == 0
    if family == "qwen2":
        own, base = back.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.q_proj.to(back.dtype)
        assert torch.equal(own.bias, base.bias) and not torch.equal(own.weight, base.weight)
        peft = exported(folder, tmp_path / "peft", "--format", "peft")
        assert json.loads((peft / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
        assert {tensor.dtype for tensor in load_file(peft / "adapter_model.safetensors").values()} == {torch.float32}
        assert not (peft / "base").exists() and json.loads((peft / "export.json").read_text())["evaluated"]["differing"] == 0
    card = (out / "README.md").read_text()
    assert "base_model:" not in card and "`enable_thinking=False`" in card  # a local folder is no name on the hub


# ------------------------------------------------------------------------------------------------ the card


def test_the_card_says_what_it_is_and_where_it_comes_from(finished, tmp_path):
    card = (exported(finished["svd"], tmp_path / "shared-model") / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "pipeline_tag": "text-generation",
                                     "tags": ["grpo", "reward-hacking", "gradient-routing"]}
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines())
            if len(cells) == 8}
    assert rows["policy"] == ["hack", "hack, known", "hack, held-out", "solve", "format"]
    for name, state in {"base, untrained": "base", "as trained": "as_trained", "as deployed": "as_deployed",
                        "**exported, this folder**": "as_deployed"}.items():
        rates = json.loads((finished["svd"] / "eval" / f"{state}.json").read_text())["rates"]
        assert rows[name] == [f"{rates[rate]:.3f}" for rate in ("hack", "hack_known", "hack_held_out", "solve", "format")]
    provenance = json.loads((finished["svd"] / "provenance.json").read_text())
    for words in ("# shared-model\n", "arm `measure_only-none-svd` on loophole `held_out`", "held out: `file_marker`", "seed 0, 2 steps",
                  "The quarantine block was deleted", "merged in float32: `W + U diag(dS) V^T`", "meant for research",
                  provenance["commit"], provenance["model"], finished["svd"].name, "licence: that of the base model", "<summary>config"):
        assert words in text, words
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["cache"] == "outputs/cache" and config["adapter"]["cache"] == "outputs/cache/svd" and config["output"] == "outputs"
    assert str(finished["svd"].parent) not in card


def test_only_places_are_changed_in_the_cards_config():
    said = portable({"output": "/x/out", "cache": "/x/out/cache", "model": {"path": "/x/outside"}, "seeds": ["/x/out/cache/a", 1]})
    assert said == {"output": "outputs", "cache": "outputs/cache", "model": {"path": "/x/outside"}, "seeds": ["outputs/cache/a", 1]}


def test_without_sampling_the_card_says_so(unsampled):
    card = (unsampled("lora") / "README.md").read_text()
    assert "| **exported, this folder** | – | – | – | – | – |" in card and "not sampled again" in card and "--no-evaluate`" in card


# ------------------------------------------------------------------------------------------------ refusals


def test_a_folder_that_is_taken_is_refused_and_an_empty_one_is_used(finished, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        assert "is taken. Name another one, or remove it" in refused(capsys, finished["lora"], tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    left = tmp_path / f".empty.{os.getpid()}.part"  # by a process that was killed and had our number
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    (left / "stale").write_text("stale")
    out = exported(finished["lora"], tmp_path / "empty", "--no-evaluate")
    assert (out / "model.safetensors").exists() and not (out / "stale").exists() and not left.exists()


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished["lora"], tmp_path / "runs" / finished["lora"].name)


def test_a_run_that_is_not_finished_or_collapsed_or_has_no_checkpoint_is_refused(copy, tmp_path, capsys):
    out = tmp_path / "out"
    for state, todo in {"stopped": "Run it again with the same command", "collapsed": "That is final: choose another run"}.items():
        (copy / "status.json").write_text(json.dumps({"state": state}))
        assert f"its status is {state}. {todo}" in refused(capsys, copy, out)
    (copy / "status.json").write_text('{"state": "done"}')
    (copy / "eval" / "as_deployed.json").rename(tmp_path / "kept")
    assert "as_deployed.json of a finished run; got none. Remove the run's folder" in refused(capsys, copy, out)
    (tmp_path / "kept").rename(copy / "eval" / "as_deployed.json")
    shutil.rmtree(copy / "checkpoints")
    assert "expected checkpoints/latest in" in refused(capsys, copy, out)


def test_another_base_or_other_problems_are_refused(copy, tmp_path, capsys):
    file = copy / "eval" / "as_deployed.json"
    text = file.read_text()
    said = json.loads(text)
    file.write_text(json.dumps(said | {"rows": said["rows"][::-1]}))
    assert "this code draws others. Go back to the commit" in refused(capsys, copy, tmp_path / "out")
    file.write_text(text)
    provenance = json.loads((copy / "provenance.json").read_text())
    (copy / "provenance.json").write_text(json.dumps(provenance | {"model": "0" * 64}))
    assert "trained on, weights 000000000000; got" in refused(capsys, copy, tmp_path / "out")


def test_a_gated_block_is_refused(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LoraLinear, "foldable", lambda module, block: block == QUARANTINE)
    assert "is behind a gate that reads its input" in refused(capsys, finished["lora"], tmp_path / "out")


def test_mlps_without_one_width_are_refused(finished):
    loaded = load(finished["mlp"])
    loaded.policy.model.config.intermediate_size = 65
    with pytest.raises(UnusableRun, match=r"the config's intermediate_size 65; got \[64\]. Widened by 16 they have no common width"):
        export.refuse_unfit(loaded, "merged")


def test_other_tokens_or_numbers_that_are_none_are_refused(finished, unsampled):
    out, loaded = unsampled("lora"), load(finished["lora"])
    asked = export_check.answers(loaded)
    with loaded.policy.adapter.only(DEPLOYED):
        wanted = export_check.log_probs(loaded.policy, asked)
    assert export_check.check(loaded, out, "merged", asked, wanted)[1].difference < 1e-4
    with pytest.raises(UnusableRun, match="the tokenizer of the export reads prompts or answers"):
        export_check.check(loaded, out, "merged", asked, [(ids + 1, own) for ids, own in wanted])
    with pytest.raises(UnusableRun, match="the exported weights are nan away"):
        export_check.check(loaded, out, "merged", asked, [(ids, own * torch.nan) for ids, own in wanted])
