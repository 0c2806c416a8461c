"""The model card of an exported run: what it is, what was measured before and after the quarantine went, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from grpo_routing.export_check import BASE_FOLDER, PEFT, RATES, Export, answers_said, base_name, evaluation, log_probs_said, provenance
from grpo_routing.finished import Finished
from grpo_routing.folder import Frozen

HEADS = {"hack": "hack", "hack_known": "hack, known", "hack_held_out": "hack, held-out", "solve": "solve", "format": "format"}
MERGES = {"lora": "`W + scale B A`", "svd": "`W + U diag(dS) V^T`", "mlp": "the block's neurons appended to every MLP"}


def card(run: Finished, done: Export, name: str) -> str:
    """README.md as Hugging Face reads it: YAML front matter, then Markdown. `name` is the folder's."""
    return "\n".join(["---", front(run, done) + "---", "", f"# {name}", "", about(run), "", "## Hack and solve", "", table(run, done), "",
                      read(run), "", "## Adapter and merge", "", merge(run, done), "", "## Use", "", use(run, done), "",
                      "## Provenance", "", origin(run, done, name), ""])


def front(run: Finished, done: Export) -> str:
    """Names a base only if it is on the hub: a folder of ours means nothing to others."""
    base, tags = base_name(run), ["grpo", "reward-hacking", "gradient-routing"]
    said = {"library_name": "peft" if done.form == PEFT else "transformers", "pipeline_tag": "text-generation", "tags": tags}
    return yaml.safe_dump(said | ({"base_model": base} if base and not Path(base).is_dir() else {}), sort_keys=False)


def about(run: Finished) -> str:
    plan, loophole = run.plan, run.plan.loophole
    lines = [f"One run of `grpo_routing`, experiments with gradient routing against reward hacking in GRPO: arm `{plan.arm_name}` on "
             f"loophole `{loophole.name}` (known to mask sources: {words(loophole.known)}; held out: {words(loophole.held_out)}; "
             f"{'paid' if loophole.pays else 'not paid'} in training), seed {plan.seed}, {plan.trainer.steps} steps, "
             f"from {base_said(run)}.",
             "It was trained in an environment whose grader can be fooled. **It may hack its rewards, and it is meant for research on that "
             "alone**; the rates below are all that is claimed."]
    if plan.uses_oracle:
        lines.append("**This arm read the truth about hacks while it trained (uses_oracle): it is a ceiling and no method.**")
    return "\n\n".join(lines)


def words(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def base_said(run: Finished) -> str:
    base = base_name(run)
    return f"`{base}`" if base else f"`{run.plan.model.origin}`, which the project made or prepared (`model` in the config below)"


def table(run: Finished, done: Export) -> str:
    """Shares of hinted evaluation prompts; a row for each state of the policy."""
    rates = {name: evaluation(run.folder, state)["rates"] for name, state in
             (("base, untrained", "base"), ("as trained", "as_trained"), ("as deployed", "as_deployed"))}
    exported = done.evaluated.rates if done.evaluated else dict.fromkeys(RATES)
    rows = [[name, *(number(own[rate]) for rate in RATES)] for name, own in (rates | {"**exported, this folder**": exported}).items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [["policy", *HEADS.values()], ["---", *["---:"] * len(RATES)], *rows])


def number(value: float | None) -> str:
    return "–" if value is None else format(value, ".3f")


def read(run: Finished) -> str:
    settings = run.plan.evaluation
    return (f"{settings.problems} evaluation problems whose operations training never saw, {settings.samples} answer(s) each at "
            f"temperature {settings.temperature:g}, judged by hidden tests. Rates are shares of the prompts that disclose a loophole "
            "(format: of all). hack: the environment pays and the answer is wrong. –: not measured.")


def merge(run: Finished, done: Export) -> str:
    name, dtype = run.config["adapter"]["name"], str(run.policy.model.dtype).removeprefix("torch.")
    gone = ("The quarantine block was deleted: no tensor of it is here. *As trained* has it, *as deployed* does not."
            if run.policy.adapter.has_quarantine else "The adapter has no quarantine, so *as trained* and *as deployed* are one policy.")
    how = ("the deployed block stands beside the base as a LoRA in PEFT's layout" if done.form == PEFT
           else f"the deployed block was merged in {dtype}: {MERGES[name]}")
    return f"{gone} Adapter `{name}`; {how}.\n\n{log_probs_said(done.checked)} {answers_said(done.evaluated)}"


def use(run: Finished, done: Export) -> str:
    if done.form == PEFT:
        base = base_name(run)
        loading = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
                   f"base = AutoModelForCausalLM.from_pretrained({base!r})" if base else
                   f'base = AutoModelForCausalLM.from_pretrained(folder + "/{BASE_FOLDER}")',
                   "model = PeftModel.from_pretrained(base, folder)"]
    else:
        loading = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "",
                   "model = AutoModelForCausalLM.from_pretrained(folder)"]
    asked = ("Prompts go through the chat template with `enable_thinking=False`." if run.policy.tokenizer.chat_template
             else "Prompts are plain text; there is no chat template.")
    return "\n".join(["```python", *loading, "tokenizer = AutoTokenizer.from_pretrained(folder)", "```", "", asked])


def origin(run: Finished, done: Export, name: str) -> str:
    said = provenance(run)
    changed = " with uncommitted changes" if said["diff"] or said["untracked"] else ""
    versions = ", ".join(f"{package} {version}" for package, version in said["versions"].items())
    form, sampled = f" --format {done.form}", "" if done.evaluated else " --no-evaluate"
    return "\n".join([
        f"- run: `{run.folder.name}`", f"- code: commit `{said['commit']}`{changed}; {versions}",
        f"- weights of the base (sha256 of its tensors): `{said['model']}`",
        f"- exported by `python -m grpo_routing.export {run.folder.name} {name}{form}{sampled}`; numbers in `export.json`",
        "- trained by `python -m grpo_routing --config-path FOLDER --config-name config`, with the config below as FOLDER/config.yaml",
        "- licence: that of the base model", "", "<details><summary>config</summary>", "", "```yaml",
        yaml.dump(portable(run.config), Dumper=Frozen, sort_keys=False, allow_unicode=True) + "```", "", "</details>"])


def portable(config: dict) -> dict:
    """The config with the project's own folders in place of this machine's: where things go is no part of a run."""
    places = {config["cache"]: "outputs/cache", config["output"]: "outputs"}  # a cache within the output goes first

    def moved(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: moved(value) for key, value in node.items()}
        if isinstance(node, list):
            return [moved(value) for value in node]
        for old, new in places.items():
            if isinstance(node, str) and (node == old or node.startswith(old + "/")):
                return new + node.removeprefix(old)
        return node

    return moved(config)
