"""A finished run as a plain Hugging Face folder: the quarantine deleted, the deployed block in the weights, checked from the files.

    python -m grpo_routing.export RUN_FOLDER OUT [--format merged|peft] [--no-evaluate]

    merged   lora, svd   W <- W + delta, in the layers that the model has
             mlp         W_gate, W_up <- [W; block], W_down <- [W, block]: an MLP wider by the block, intermediate_size with it
    peft     lora alone: A and B in PEFT's layout, lora_alpha / r = adapter.scale; the base is named, or lies in `base` where it is ours

Weights are folded by the adapter itself (`Adapter.merged`), as the deployed policy was sampled and evaluated, so an exported model has
the bits that eval/as_deployed.json was measured with and one rounding per weight lies between it and its branches: none to speak of in
float32, about 2^-9 of every weight in bfloat16. In PEFT's layout A and B are float32 whatever the base is, as PEFT keeps them. Exact
beyond that rounding if the block is a change of weights: one behind a gate is refused, and so is a widened MLP in a model whose MLPs do
not all have the width `intermediate_size` (no number in config.json could then be right). adapter=mlp adapts every gated MLP alike and
branches through the MLP's own activation, so no layer needs padding.

A folder that is left has passed export_check.py: plain transformers read it, its tokens are the run's, its log-probabilities lie within the
tolerance of its precision, and no name or number of the quarantine is in it. It is written under a hidden name and renamed at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.adapters.lora import Lora
from grpo_routing.adapters.mlp import Mlp
from grpo_routing.export_card import card
from grpo_routing.export_check import BASE_FOLDER, MERGED, PEFT, Export, answers, base_name, check, evaluated, log_probs, provenance
from grpo_routing.files import write_atomic, write_json
from grpo_routing.finished import Finished, UnusableRun, load
from grpo_routing.organism import quiet_transformers
from grpo_routing.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def main(argv: list[str]) -> int:
    """Export and print what was checked; the exit status is 2 when the run or OUT cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.export", description="A finished run as a plain Hugging Face folder.")
    parser.add_argument("run", type=Path, help="outputs/<experiment>/runs/<run> of a finished run")
    parser.add_argument("out", type=Path, help="a folder that is not there yet, or is empty")
    parser.add_argument("--format", choices=(MERGED, PEFT), default=MERGED, help="whole weights, or a LoRA in PEFT's layout (merged)")
    parser.add_argument("--no-evaluate", action="store_true", help="do not sample the exported model on the run's evaluation problems")
    asked = parser.parse_args(argv)
    try:
        print(export(asked.run, asked.out, asked.format, not asked.no_evaluate))
    except UnusableRun as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def export(folder: Path, out: Path, form: str, sampled: bool) -> str:
    """Write `out` and return what was checked. Raises UnusableRun, and then leaves nothing behind."""
    out = out.resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UnusableRun(f"expected a folder that is not there yet, or is empty; {out} is taken. Name another one, or remove it")
    run = load(folder)
    refuse_unfit(run, form)
    asked = answers(run)
    with run.policy.adapter.only(DEPLOYED):
        wanted = log_probs(run.policy, asked)
    with hidden(out) as part:
        (write_peft if form == PEFT else write_merged)(run, part)
        reopened, checked = check(run, part, form, asked, wanted)
        done = Export(form, checked, evaluated(run, reopened) if sampled else None)
        write_json(part / "export.json", done.facts(run))
        write_atomic(part / "README.md", card(run, done, out.name).encode())
    return f"{run.folder.name} -> {out}\n{done.said()}"


@contextmanager
def hidden(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` if nothing goes wrong and else is removed."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)  # also onto an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_unfit(run: Finished, form: str) -> None:
    """Raises UnusableRun for what no export can say exactly, and for a base other than the one that the run trained on."""
    trained, here, adapter = provenance(run)["model"], run.policy.fingerprint, run.plan.adapter
    if trained != here:
        raise UnusableRun(f"expected the base model that {run.folder.name} trained on, weights {trained[:12]}; got {here[:12]}. The "
                          "recipe, torch or the model's files changed since: go back to the commit in its provenance.json, or run it again")
    if form == PEFT and not isinstance(adapter, Lora):
        raise UnusableRun(f"--format peft is for adapter=lora; {run.folder.name} has adapter={type(adapter).__name__.lower()}. "
                          "Leave --format out: its deployed block goes into the weights")
    if gated := [name for name, module in run.policy.adapter.modules.items() if not module.foldable(DEPLOYED)]:
        raise UnusableRun(f"the deployed block of {gated[0]} is behind a gate that reads its input, so it is no change of weights and "
                          "cannot be merged; choose a run with adapter.gate=false")
    if isinstance(adapter, Mlp):
        said = run.policy.model.config.get_text_config().intermediate_size
        widths = {len(module.frozen.gate_proj.weight) for module in run.policy.adapter.modules.values()}
        if widths != {said}:
            raise UnusableRun(f"expected MLPs of one width, the config's intermediate_size {said}; got {sorted(widths)}. Widened by "
                              f"{adapter.width} they have no common width to write down; choose a run with adapter=lora or svd")


# ------------------------------------------------------------------------------------------------ writing


def write_merged(run: Finished, folder: Path) -> None:
    """config, generation config, safetensors, tokenizer and chat template. Takes the policy's model for itself."""
    model = settled(run.policy, DEPLOYED)
    if isinstance(run.plan.adapter, Mlp):
        model.config.get_text_config().intermediate_size += run.plan.adapter.width
    save(run, model, folder)


def write_peft(run: Finished, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors as peft 0.21 writes them (one rank holds for all modules, so no patterns), the
    tokenizer, and the base where nobody could fetch it. Takes the policy's model for itself."""
    adapter, base, modules = run.plan.adapter, base_name(run), run.policy.adapter.parameters(DEPLOYED)
    alpha = adapter.scale * adapter.rank
    tensors = {f"base_model.model.{name}.lora_{key}.weight": own[key].detach().cpu().contiguous()
               for name, own in modules.items() for key in ("A", "B")}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or BASE_FOLDER,
        "r": adapter.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}), "rank_pattern": {}, "alpha_pattern": {},
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True,
        "inference_mode": True})
    with quiet_transformers():
        run.policy.tokenizer.save_pretrained(folder)
    if not base:
        save(run, settled(run.policy), folder / BASE_FOLDER)


def settled(policy: Policy, *blocks: str) -> PreTrainedModel:
    """The policy's own model with these blocks in its weights and no adapter left; the policy cannot be used any more."""
    with policy.adapter.only(*blocks), policy.adapter.merged():
        plain = {name: module.plain() for name, module in policy.adapter.modules.items()}
    for name, module in plain.items():
        parent, _, leaf = name.rpartition(".")
        setattr(policy.model.get_submodule(parent), leaf, module)
    return policy.model


def save(run: Finished, model: PreTrainedModel, folder: Path) -> None:
    """As `from_pretrained` reads it. `generate` samples as the run was evaluated: at its temperature from all tokens, until its end."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=run.policy.end, pad_token_id=run.policy.pad, do_sample=True, top_k=0, top_p=1.0,
                                               temperature=run.plan.evaluation.temperature,
                                               max_new_tokens=run.plan.trainer.max_new_tokens)
    with quiet_transformers():
        model.save_pretrained(folder)
        run.policy.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
