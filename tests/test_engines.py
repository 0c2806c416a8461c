"""Claims about who writes rollouts: the same distribution, the trainer's log-probs, and a canary that dies of old weights."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from grpo_routing.build import ConfigError, build_policy, plan
from grpo_routing.engines.canary import NotServed, Watched, update_served
from grpo_routing.engines.transformers_cb import TransformersCb, gathered
from grpo_routing.engines.vllm import completion
from grpo_routing.parallel import World
from grpo_routing.rollout import OWN, named_seed, uniforms
from grpo_routing.run import run
from grpo_routing.types import TokenBatch

CB = "rollout=transformers_cb"
PROMPTS, COUNTS, NEW = [tuple(range(20, 60)), tuple(range(100, 107)), tuple(range(50, 90))], [3, 2, 4], 6
NAMES = [("test", row) for row in range(sum(COUNTS))]


@pytest.fixture
def policy(config):
    """In single precision, its adapter off its starting point."""
    return moved(build_policy(plan(config("adapter.quarantine_rank=2"))), 0)


def moved(policy, seed: int, size: float = 0.1):
    generator = torch.Generator().manual_seed(seed)
    for tensor in policy.adapter.state().values():
        tensor.copy_(tensor + size * torch.randn(tensor.shape, generator=generator))
    return policy


def asked(engine, policy, names=NAMES, new=NEW):
    return engine.sample(policy, PROMPTS, COUNTS, names, new, 1.0, 64)


def cb(config, *words: str) -> TransformersCb:
    return plan(config(CB, *words)).rollout


def trainers(policy, sampled) -> torch.Tensor:
    """The gradient forward's log-probs of what was sampled, token after token."""
    rows = [prompt for prompt, count in zip(PROMPTS, COUNTS) for _ in range(count)]
    tokens = TokenBatch.of([(prompt, ids) for prompt, (ids, _) in zip(rows, sampled)], policy.pad)
    with torch.no_grad():
        return policy.log_probs(tokens)[tokens.completion_mask]


def said(sampled) -> torch.Tensor:
    return torch.tensor([one for _, own in sampled for one in own])


# ------------------------------------------------------------------------------------------------------------ own


def test_own_is_the_policys_sampling_bit_for_bit_whatever_shares_a_forward(policy):
    noise = uniforms(NAMES, NEW)
    whole = policy.sample(PROMPTS, COUNTS, noise, 1.0)
    assert OWN.sample(policy, PROMPTS, COUNTS, NAMES, NEW, 1.0, 64) == whole
    parts = policy.sample(PROMPTS[:2], COUNTS[:2], noise[:5], 1.0) + policy.sample(PROMPTS[2:], COUNTS[2:], noise[5:], 1.0)
    assert OWN.sample(policy, PROMPTS, COUNTS, NAMES, NEW, 1.0, 2) == parts and OWN.facts() == {}


# ------------------------------------------------------------------------------------- transformers' continuous batching


@pytest.mark.parametrize("words", [("adapter.quarantine_rank=2",), ("adapter.quarantine_rank=2", "adapter.gate=true"),
                                   ("adapter=svd", "adapter.axes=disjoint"), ("adapter=mlp", "adapter.quarantine_width=4")])
@pytest.mark.parametrize("quarantine", [1.0, 0.0])
def test_cb_reports_the_trainers_log_probs_with_every_adapter_and_seat(config, words, quarantine):
    policy = moved(build_policy(plan(config(*words))), 1)
    before = policy.adapter.fingerprint()
    with policy.adapter.scaled({"quarantine": quarantine}):
        sampled = asked(cb(config), policy)
        torch.testing.assert_close(said(sampled), trainers(policy, sampled), atol=1e-5, rtol=0)
    with policy.adapter.scaled({"quarantine": 1.0 - quarantine}):  # and would tell another scale
        assert (said(sampled) - trainers(policy, sampled)).abs().max() > 1e-3
    assert [len(ids) == NEW or ids[-1] == policy.end for ids, _ in sampled] == [True] * len(NAMES)
    assert policy.adapter.fingerprint() == before and policy.model.config._attn_implementation == "sdpa"


def test_cb_draws_from_the_policys_distribution(policy, config):
    """First tokens of 1,500 rollouts against the probabilities of the whole vocabulary, in ten bins of about equal probability."""
    count = 1500
    sampled = cb(config).sample(policy, PROMPTS[1:2], [count], [("many", 0)] * count, 1, 1.0, 64)
    with torch.no_grad(), policy.adapter.merged():
        probability = torch.softmax(policy.model(torch.tensor([PROMPTS[1]])).logits[0, -1].double(), -1)
    bins = torch.empty(len(probability), dtype=torch.long)
    bins[probability.argsort()] = (probability.sort().values.cumsum(0) * 10).long().clamp(max=9)
    found = torch.bincount(bins[torch.tensor([ids[0] for ids, _ in sampled])], minlength=10)
    expected = torch.zeros(10, dtype=torch.float64).index_add(0, bins, probability) * count
    assert chisquare(found.numpy(), expected.numpy()).pvalue > 0.01
    flat = torch.full_like(probability, 1 / len(probability))  # and would tell another one
    assert chisquare(found.numpy(), (torch.zeros(10, dtype=torch.float64).index_add(0, bins, flat) * count).numpy()).pvalue < 1e-6


def test_cb_writes_the_same_again_on_a_cpu_and_leaves_torchs_stream_alone(policy, config):
    torch.manual_seed(5)
    first = asked(cb(config), policy)
    drawn = torch.rand(1)
    assert asked(cb(config, "rollout.max_rows=64"), policy) == first
    assert asked(cb(config), policy, [("other", 0), *NAMES[1:]]) != first
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_cb_lets_rows_wait_for_room(policy, config):
    sampled = asked(cb(config, "rollout.max_rows=2", "rollout.page_size=8", "rollout.max_batch_tokens=32"), policy)
    torch.testing.assert_close(said(sampled), trainers(policy, sampled), atol=1e-5, rtol=0)


def test_a_diverged_policy_is_told_from_a_broken_engine(policy, config):
    policy.adapter.load_state({key: value * float("nan") for key, value in policy.adapter.state().items()})
    with pytest.raises(FloatingPointError, match="continuous batching failed: .*nan"):
        asked(cb(config), policy)


def test_a_run_logs_what_was_served_and_only_such_a_run_does(config, tmp_path):
    for rollout in ("transformers_cb", "own"):
        folder = run(config(f"rollout={rollout}", f"output={tmp_path}", "evaluation.problems=2"))
        rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        found = [{name: value for name, value in row.items() if "served" in name} for row in rows]
        if rollout == "own":
            assert found == [{}, {}]
        else:
            assert [row["rollout/served_gap"] < row["rollout/served_gap_max"] < 1e-5 for row in found] == [True, True]
            assert found[0]["rollout/served_update"] == pytest.approx(1, abs=1e-3)  # from the adapter that the canary moved


# -------------------------------------------------------------------------------------------------------- the canary


@dataclass
class Lagging:
    """Serves the adapter of so many calls ago; the very first one for good where that is `frozen`."""

    calls: int = 0
    frozen: bool = False
    seen: list = field(default_factory=list)

    def sample(self, policy, *rest):
        present = {key: value.clone() for key, value in policy.adapter.state().items()}
        self.seen.append(present)
        policy.adapter.load_state(self.seen[0] if self.frozen else self.seen[max(0, len(self.seen) - 1 - self.calls)])
        try:
            return OWN.sample(policy, *rest)
        finally:
            policy.adapter.load_state(present)


@dataclass
class Base:
    """Serves the base model, as small-rl's LoRA did (graft.md 1.12)."""

    def sample(self, policy, *rest):
        with policy.adapter.only():
            return OWN.sample(policy, *rest)


def steps(watched, policy, sizes) -> list[dict]:
    """A batch, the step's facts and an update of this size, again and again."""
    rows = []
    for number, size in enumerate(sizes):
        asked(watched, policy, [("step", number, row) for row in range(len(NAMES))], 12)
        rows.append(watched.facts())
        moved(policy, 100 + number, size)
    return rows


def test_the_canary_lives_on_what_follows_the_adapter(policy):
    rows = steps(Watched(OWN, "own", 4, 1e-3), policy, [1e-2, 1e-3, 0.0, 1e-3])
    assert all(row["rollout/served_gap"] < 1e-5 for row in rows)
    assert [row.get("rollout/served_update") for row in rows] == [
        pytest.approx(1, abs=1e-3), pytest.approx(1, abs=1e-2), pytest.approx(1, abs=0.1), None]  # nothing changed before the last


@pytest.mark.parametrize("engine", [Lagging(frozen=True), Lagging(1)], ids=["frozen", "lagging"])
def test_an_engine_that_does_not_follow_dies_in_its_first_batch(policy, engine):
    before = policy.adapter.fingerprint()
    with pytest.raises(NotServed, match="rollout=named did not follow the adapter: .* lie at -?0.[0-4]"):
        steps(Watched(engine, "named", 4, 1e9), policy, [0.01])
    assert policy.adapter.fingerprint() == before  # the move was taken back


def test_the_base_model_in_place_of_the_policy_dies_too(policy):
    """From the start of a run, where the adapter adds nothing, and from a checkpoint, where base, policy and moved policy are three."""
    with pytest.raises(NotServed, match="rollout=named reports log-probs that differ from the trainer's"):
        steps(Watched(Base(), "named", 4, 1e-3), policy, [0.01])
    policy.adapter.load_state({key: value * ("/B" not in key) for key, value in policy.adapter.state().items()})
    with pytest.raises(NotServed, match="rollout=named did not follow the adapter: .* lie at -?0.00"):
        steps(Watched(Base(), "named", 4, 1e-3), policy, [0.01])


def test_one_that_stops_following_later_dies_although_it_is_within_the_tolerance(policy):
    """And steps that rounding hides are added up until they show."""
    engine = Lagging()
    watched = Watched(engine, "named", 4, 1.0)
    steps(watched, policy, [1e-4])
    engine.seen, engine.frozen = engine.seen[-1:], True
    with pytest.raises(NotServed, match=r"did not follow the adapter: .* mean gap 0\.00"):
        steps(watched, policy, [1e-4])


def test_a_step_that_rounding_hides_is_added_to_the_next(policy):
    @dataclass
    class Rough:
        """Log-probs off by a hundredth, as in half precision."""

        def sample(self, policy, prompts, counts, names, *rest):
            sampled = OWN.sample(policy, prompts, counts, names, *rest)
            noise = torch.Generator().manual_seed(named_seed(*names[0]) >> 1)
            return [(ids, tuple(one + 0.01 * float(torch.randn((), generator=noise)) for one in own)) for ids, own in sampled]

    watched = Watched(Rough(), "named", 9, 0.05)
    (first,) = steps(watched, policy, [1e-4])
    assert first["rollout/served_update"] == pytest.approx(1, abs=0.1)
    kept = watched.earlier
    (second,) = steps(watched, policy, [0.03])
    assert "rollout/served_update" not in second and watched.earlier is kept
    (third,) = steps(watched, policy, [0.0])
    assert third["rollout/served_update"] == pytest.approx(1, abs=0.2) and watched.earlier is not kept


def test_other_log_probs_die_at_the_tolerance(policy):
    class Tempered:
        def sample(self, policy, prompts, counts, names, new, temperature, at_once):
            return [(ids, tuple(1.1 * one for one in own)) for ids, own in OWN.sample(policy, prompts, counts, names, new, 1.0, at_once)]

    with pytest.raises(NotServed, match=r"differ from the trainer's by 0\.\d+ nats on average .* rollout.canary.tolerance is 0.001"):
        steps(Watched(Tempered(), "named", 4, 1e-3), policy, [0.0])


def test_a_manager_that_is_kept_serves_pages_of_old_weights_and_the_canary_sees_it(policy, config):
    """Why each batch has its own (transformers_cb.py): transformers keeps a prompt's pages when a kept manager starts again."""
    engine = cb(config, "rollout.page_size=4")

    class Kept:
        manager = None

        def sample(self, policy, prompts, counts, names, new, *rest):
            rows = [list(prompt) for prompt, count in zip(prompts, counts) for _ in range(count)]
            with policy.adapter.merged():
                if self.manager is None:
                    self.manager = engine.manager(policy, [max(PROMPTS, key=len)] * 20, 12, 0)
                self.manager.start()
                for row, prompt in enumerate(rows):
                    self.manager.add_request(prompt, request_id=str(row), max_new_tokens=new)
                try:
                    return gathered(self.manager, len(rows))
                finally:
                    self.manager.stop(keep_for_next_session=True)

    kept = Kept()
    try:
        with pytest.raises(NotServed, match="rollout=named did not follow the adapter|differ from the trainer's"):
            steps(Watched(kept, "named", 9, 1e-3), policy, [0.1])
    finally:
        policy.model.destroy_cached_continuous_batching_manager()


def test_what_hides_behind_rounding_is_not_decided():
    before, change = torch.zeros(1000), torch.full((1000,), 1e-3)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert update_served(before, before, before) is None and update_served(before + change + 0.1 * noise, before, before + change) is None
    assert update_served(before + change + 1e-4 * noise, before, before + change) == pytest.approx(1, abs=0.02)
    assert update_served(before + 1e-4 * noise, before, before + change) == pytest.approx(0, abs=0.02)


def test_several_processes_are_refused(policy, config):
    policy.world = World(0, 2)
    with pytest.raises(ValueError, match="rollout=transformers_cb serves a run in one process, and this one has 2; use rollout=own"):
        cb(config).start(policy)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("words", "message"), [
    ((CB, "sampling=suppressed"), "sampling=suppressed edits hidden states .* canary of rollout=transformers_cb .*; use rollout=own"),
    ((CB, "trainer.temperature=0.7"), "rollout=transformers_cb reports log-probs of the tempered distribution"),
    ((CB, "rollout.canary.tolerance=-1"), "rollout.canary.tolerance must be auto or a positive number of nats; got -1"),
    ((CB, "rollout.canary.tolerance=tight"), "rollout.canary.tolerance must be auto or a positive number of nats; got 'tight'"),
    ((CB, "rollout.canary.checked=0"), "rollout.canary.checked must be at least 1; got 0"),
    ((CB, "rollout.page_size=2"), "rollout.page_size must be at least 4; got 2"),
    (("rollout=vllm", "sampling=suppressed"), "sampling=suppressed edits hidden states"),
    (("rollout=vllm", "adapter=mlp"), "adapter=mlp widens the MLPs, and the copy that rollout=vllm serves .*; use adapter=lora or svd"),
    (("rollout=vllm", "adapter.quarantine_rank=2", "adapter.gate=true"), "a gate depends on its input .*; set adapter.gate=false"),
    (("rollout=vllm", "adapter.quarantine_rank=2", "extra_rollouts=anchor"), "rollout=vllm serves one copy of the weights a step"),
    (("rollout=vllm", "arm=sgtm"), "rollout=vllm serves one copy of the weights a step"),
    (("rollout=vllm", "rollout.memory=1.5"), "rollout.memory must be a share of the GPU's memory between 0 and 1; got 1.5")])
def test_what_an_engine_cannot_serve_is_refused_when_planned(config, words, message):
    with pytest.raises(ConfigError, match=message):
        plan(config(*words))


@pytest.mark.parametrize("words", [(CB, "adapter=mlp"), (CB, "arm=sgtm"), ("rollout=vllm", "adapter=svd"),
                                   ("rollout=vllm", "arm=route_random")])
def test_what_can_be_served_is_planned(config, words):
    plan(config(*words))


# --------------------------------------------------------------------------------------------------------------- vllm


def test_without_the_package_the_run_says_what_to_do(policy, config):
    with pytest.raises(RuntimeError, match="rollout=vllm needs the package vllm, which is not installed .*; use rollout=transformers_cb"):
        plan(config("rollout=vllm")).rollout.start(policy)


@dataclass(frozen=True)
class Words:
    """vllm.SamplingParams as far as it is used."""

    n: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    logprobs: int
    max_tokens: int
    stop_token_ids: list
    detokenize: bool


class StandIn:
    """vllm.LLM: a plain model of transformers, empty, built from the folder that it is given, and transformers.generate."""

    def __init__(self, model: str, load_format: str, dtype: str, **settings) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        assert load_format == "dummy"
        self.settings = settings
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=getattr(torch, dtype)).eval()
        self.model.load_weights = self.load_weights
        self.deaf, self.resets, self.asked = False, 0, []

    def load_weights(self, weights) -> set[str]:
        own, got = self.model.state_dict(), dict(weights)
        if not self.deaf:
            for name, tensor in got.items():
                own[name].copy_(tensor)
        return set(got)

    def apply_model(self, function) -> list:
        with torch.no_grad():
            return [function(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def generate(self, prompts, words, use_tqdm) -> list:
        self.asked += zip(prompts, words)
        return [self.one(prompt["prompt_token_ids"], word) for prompt, word in zip(prompts, words, strict=True)]

    def one(self, prompt, word):
        ids, rows = list(prompt), []
        generator = torch.Generator().manual_seed(word.seed)
        for _ in range(word.max_tokens):
            with torch.no_grad():
                own = torch.log_softmax(self.model(torch.tensor([ids])).logits[0, -1], -1)
            token = int(torch.multinomial((own / word.temperature).exp(), 1, generator=generator))
            ids.append(token)
            rows.append({token: SimpleNamespace(logprob=float(own[token]))})
            if token in word.stop_token_ids:
                break
        stopped = ids[-1] in word.stop_token_ids
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[len(prompt):], logprobs=rows,
                                                        finish_reason="stop" if stopped else "length")])


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__spec__ = StandIn, Words, ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.parametrize("words", [("adapter.quarantine_rank=2",), ("adapter=svd", "adapter.axes=disjoint")])
@pytest.mark.parametrize("quarantine", [1.0, 0.3])
def test_vllm_would_be_given_the_policy_as_it_stands(vllm, config, words, quarantine):
    """A plain model that is given the weights, in a process that knows no adapter, is the policy: the log-probs of its samples agree."""
    policy = moved(build_policy(plan(config(*words))), 1)
    watched = plan(config("rollout=vllm", *words)).rollout.start(policy)
    llm = watched.engine.llm
    for seed in (2, 3):
        moved(policy, seed)
        with policy.adapter.scaled({"quarantine": quarantine}):
            sampled = asked(watched, policy)
            torch.testing.assert_close(said(sampled), trainers(policy, sampled), atol=2e-5, rtol=0)
        assert watched.facts()["rollout/served_update"] == pytest.approx(1, abs=1e-3)
    assert llm.resets == 3  # the canary's move, and two batches


def test_what_vllm_is_asked(vllm, config, policy):
    watched = plan(config("rollout=vllm", "rollout.memory=0.3")).rollout.start(policy)
    watched.sample(policy, PROMPTS, COUNTS, NAMES, NEW, 0.7, 64)
    llm = watched.engine.llm
    assert llm.settings == {"skip_tokenizer_init": True, "generation_config": "vllm", "gpu_memory_utilization": 0.3,
                            "max_model_len": 2048, "enforce_eager": False, "enable_prefix_caching": True,
                            "logprobs_mode": "raw_logprobs", "tensor_parallel_size": 1}
    rows = [prompt for prompt, count in zip(PROMPTS, COUNTS) for _ in range(count)]
    assert llm.asked[-len(rows):] == [({"prompt_token_ids": list(prompt)}, Words(
        n=1, seed=named_seed(*name) >> 1, temperature=0.7, top_p=1.0, top_k=-1, logprobs=0, max_tokens=NEW, stop_token_ids=[policy.end],
        detokenize=False)) for prompt, name in zip(rows, NAMES)]
    assert max(named_seed(*name) >> 1 for name in NAMES) < 2**63


def test_a_server_that_is_deaf_to_new_weights_dies_in_its_first_batch_and_later(vllm, config, policy):
    rollout = plan(config("rollout=vllm")).rollout
    watched = rollout.start(policy)
    watched.engine.llm.deaf = True
    with pytest.raises(NotServed, match="rollout=vllm"):
        asked(watched, policy)
    watched = rollout.start(policy)
    steps(watched, policy, [1e-3])
    watched.engine.llm.deaf = True
    with pytest.raises(NotServed, match=r"rollout=vllm did not follow the adapter: .*look at how grpo_routing/engines/vllm.py"):
        steps(watched, policy, [1e-3])


def test_a_part_of_the_weights_is_refused_and_so_is_a_cache_that_stays(vllm, config, policy):
    watched = plan(config("rollout=vllm")).rollout.start(policy)
    llm = watched.engine.llm
    llm.reset_prefix_cache = lambda: False
    with pytest.raises(RuntimeError, match="could not reset its prefix cache"):
        watched.engine.sync(policy)
    llm.model.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"has 1 parameters that the trained one did not give, such as \['more'\]"):
        watched.engine.sync(policy)


def test_prompts_that_do_not_fit_are_refused(vllm, config, policy):
    watched = plan(config("rollout=vllm", "rollout.max_length=45")).rollout.start(policy)
    with pytest.raises(ValueError, match="rollout.max_length is 45, and a prompt with its completion has up to 46 tokens"):
        watched.engine.sample(policy, PROMPTS, COUNTS, NAMES, NEW, 1.0, 64)


def test_outputs_are_read_and_odd_ones_refused():
    first, last, other = ({token: SimpleNamespace(logprob=value)} for token, value in ((5, -1.0), (9, -2.0), (8, -3.0)))
    good = SimpleNamespace(token_ids=[5, 9], finish_reason="stop", logprobs=[first | {7: SimpleNamespace(logprob=-0.1)}, last])
    assert completion(SimpleNamespace(outputs=[good]), 9) == ((5, 9), (-1.0, -2.0))

    def odd(**changes):
        return SimpleNamespace(outputs=[SimpleNamespace(**vars(good) | changes)])

    assert completion(odd(finish_reason="length", token_ids=[5, 8], logprobs=[first, other]), 9) == ((5, 8), (-1.0, -3.0))
    for changes in ({"finish_reason": "abort"}, {"finish_reason": "length"}, {"token_ids": [5, 8]}):
        with pytest.raises(RuntimeError, match="expected a completion that ends with token 9 or at its length"):
            completion(odd(**changes), 9)
    for logprobs in (None, good.logprobs[:1]):
        with pytest.raises(RuntimeError, match="expected a log-prob of each of 2 tokens"):
            completion(odd(logprobs=logprobs), 9)


def test_a_model_of_the_hub_is_given_whole(vllm, config, policy):
    """Tied or not, the head is served."""
    watched = plan(config("rollout=vllm")).rollout.start(policy)
    assert policy.model.config.tie_word_embeddings == watched.engine.llm.model.config.tie_word_embeddings
    watched.engine.sync(policy)
    with policy.adapter.merged():
        theirs, ours = watched.engine.llm.model.state_dict(), policy.model.state_dict()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
