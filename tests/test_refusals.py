"""Nothing is silently wrong: what cannot be right is refused or warned of, and what could go wrong is right."""

import inspect

import pytest
import torch
import transformers
from conftest import LAYERS, ROUTED, SHAPE, WIDTH, build, build_routed, tokens

import mindskip
from mindskip import (
    MindSkipConfig,
    add_mindskip,
    capacity_loss,
    fix_gates,
    keep_ratio,
    last,
    router_parameters,
    routers,
    save_routers,
)


def generate(model, ids, **changes) -> torch.Tensor:
    """(B, tokens), greedily; eight more tokens."""
    given = {
        "attention_mask": None if ids is None else torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": 8,
        "eos_token_id": None,
    }
    return model.generate(ids, **given | changes)


def kimi(**changes) -> torch.nn.Module:
    """A hybrid: linear attention, which is called `self_attn` too, and every third layer full attention."""
    kinds = ["linear_attention", "linear_attention", "full_attention"] * 3
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": len(kinds), "num_key_value_heads": 4} | changes
    latent = {
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
    experts = {
        "n_routed_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
    }
    config = transformers.KimiLinearConfig(
        **shape, **latent, **linear, **experts, topk_group=1, layer_types=kinds
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_linear_attention_is_no_attention_that_can_be_routed():
    model = kimi()
    assert all(getattr(layer, "self_attn", None) is not None for layer in model.model.layers)
    assert mindskip.attention_layers(model) == [
        2,
        5,
        8,
    ]  # the cache takes its length from layer 2: never routed
    for layers in ((2,), (1,), (3, 5)):
        with pytest.raises(ValueError, match=r"\[5, 8\]"):
            add_mindskip(model, MindSkipConfig(layers))


@torch.no_grad()
def test_a_second_turn_of_a_hybrid_follows_the_first_decision():
    model, ids = add_mindskip(kimi(), MindSkipConfig((5, 8))), tokens(length=12)
    gates = {5: torch.tensor([True, False, True, False]), 8: False}
    with fix_gates(model, gates):
        expected, cache = (
            model(ids, use_cache=False).logits,
            model(ids[:, :7], use_cache=True).past_key_values,
        )
        for step in (slice(7, 11), slice(11, 12)):
            logits = model(ids[:, step], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(
                logits, expected[:, step], atol=1e-4, rtol=1e-3
            )  # another order of sums


def record_votes(monkeypatch, seen: list) -> None:
    """Note (B, T) bool, who votes, at every decision of a router."""
    forward = mindskip.Router.forward
    monkeypatch.setattr(
        mindskip.Router, "forward", lambda self, x, votes: seen.append(votes) or forward(self, x, votes)
    )


@pytest.mark.parametrize("how", ["no cache", "look-up", "assistant"])
def test_however_a_prompt_is_continued_the_prompt_alone_decides(how, monkeypatch):
    model, decided = build_routed(), []
    record_votes(monkeypatch, decided)
    more = {
        "no cache": {"use_cache": False},
        "look-up": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": build(num_hidden_layers=2)},
    }[how]
    differ = 0
    for seed in range(10):
        ids = tokens(rows=1, length=9, seed=seed)
        ids = torch.cat([ids, ids], 1)  # something to look up
        expected = generate(model, ids)
        decided.clear()
        assert torch.equal(generate(model, ids, **more), expected)
        assert decided and all(torch.equal(one.sum(1), torch.tensor([18])) for one in decided)
        patterns = []
        for given in (ids, expected):  # were every token to vote, would it decide otherwise?
            model(given)
            patterns.append(last(model, "gate").flatten().tolist())
        differ += patterns[0] != patterns[1]
    assert differ > 0


def test_padding_does_not_vote_without_a_cache():
    model, ids = build_routed(), tokens(rows=1, length=9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    assert torch.equal(
        generate(model, padded, attention_mask=mask, use_cache=False)[:, 4:], generate(model, ids)
    )


def test_a_prompt_that_comes_in_chunks_is_refused():
    with pytest.raises(ValueError, match="whole prompt: 20 tokens, not 6"):
        generate(build_routed(), tokens(), prefill_chunk_size=6)


@torch.no_grad()
def test_positional_labels_count():
    model, ids = build_routed(), tokens()
    labels = ids.masked_fill(torch.arange(20) < 8, -100)
    expected = model(input_ids=ids, labels=labels).loss
    gates = last(model, "gate")
    names = list(inspect.signature(transformers.LlamaForCausalLM.forward).parameters)
    assert names[1] == "input_ids" and names[6] == "labels"
    assert torch.equal(model(ids, None, None, None, None, labels).loss, expected)
    assert torch.equal(last(model, "gate"), gates)


def test_labels_that_leave_no_prompt_are_told():
    model, ids = build_routed(), tokens()
    with pytest.warns(UserWarning, match="pass voters"):
        model(ids, labels=ids)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with pytest.raises(ValueError, match="pass voters"):
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), voters=mask.bool())


def test_attention_weights_are_refused_where_attention_is_skipped():
    model, ids = build_routed(attn_implementation="eager"), tokens()
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    expected = build(attn_implementation="eager")(ids, output_attentions=True).attentions
    with fix_gates(model, dict.fromkeys(ROUTED, True)):  # in training everything is computed
        found = model.train()(ids, output_attentions=True, use_cache=False).attentions
    assert len(found) == LAYERS and all(map(torch.equal, found, expected))


def test_a_padded_batch_without_a_mask_is_told(monkeypatch):
    model, ids = build_routed(), tokens()
    ids[0, -3:] = model.config.pad_token_id
    messages = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", messages.append)
    model(ids)
    assert messages and "attention_mask" in messages[0]
    messages.clear()
    model(ids, attention_mask=(ids != model.config.pad_token_id).long())
    model(ids, voters=ids != model.config.pad_token_id)
    model(tokens())
    assert not messages


def test_packed_sequences_are_refused():
    model, ids = build_routed(), tokens()
    places = torch.arange(20).remainder(10)[None].expand(4, -1)
    with pytest.raises(ValueError, match="packed"):
        model(ids, position_ids=places)
    model(ids, position_ids=places, voters=torch.ones_like(ids).bool())
    model(ids, position_ids=torch.arange(20)[None].expand(4, -1))


@pytest.mark.parametrize("gate", [0.5, 2, None, float("nan"), torch.tensor([1.0, 0.0, 1.0, 1.0])])
def test_gates_that_are_neither_open_nor_closed_are_refused(gate):
    model = build_routed()
    with pytest.raises(ValueError, match="True, False"), fix_gates(model, {2: True, 3: gate}):
        pass
    assert all(router.fixed is None for router in routers(model))


@pytest.mark.parametrize("capacity", [-0.1, 1.5, float("nan")])
def test_capacities_outside_of_0_and_1_are_refused(capacity):
    model = build_routed()
    model(tokens())
    with pytest.raises(ValueError, match="capacity"):
        capacity_loss(model, capacity)


@pytest.mark.parametrize("voters", [torch.ones(4, 20), torch.ones(4, 20).long()])
def test_voters_are_boolean(voters):
    with pytest.raises(ValueError, match="bool"):
        build_routed()(tokens(), voters=voters)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_routers_that_are_not_finite_are_neither_saved_nor_loaded(value, tmp_path):
    model, path = build_routed(), tmp_path / "routers.safetensors"
    save_routers(model, path)
    before = path.read_bytes()
    routers(model)[1].weight.data[3] = torch.tensor(value, dtype=torch.float64).float()
    with pytest.raises(ValueError, match="finite"):
        save_routers(model, path)
    assert path.read_bytes() == before
    described, tensors = mindskip.read_routers(path)
    tensors["layers.3.router.weight"] = torch.full((WIDTH,), value, dtype=torch.float64)
    with mindskip.safe_open(path, "pt") as file:
        about = file.metadata()
    path.write_bytes(mindskip.save(tensors, about))
    with pytest.raises(ValueError, match="finite"):
        mindskip.load_routers(build(), path)


def test_thresholds_that_differ_are_refused_when_saving(tmp_path):
    model = build_routed()
    routers(model)[1].config = MindSkipConfig(ROUTED, threshold=0.7)
    with pytest.raises(ValueError, match="one configuration"):
        save_routers(model, tmp_path / "routers.safetensors")
    assert not list(tmp_path.iterdir())


def test_reentrant_checkpointing_is_refused():
    model = build_routed()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.train()(tokens(), use_cache=False)
    model.eval()(tokens())


@torch.no_grad()
def test_a_cache_keeps_its_decisions_and_says_so():
    model, ids = build_routed(), tokens()
    cache = model(ids[:, :10], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="keeps its decisions"), fix_gates(model, {3: True}):
        model(ids[:, 10:11], past_key_values=cache)
    with pytest.raises(ValueError, match="voters"):
        model(ids[:, 10:11], past_key_values=cache, voters=torch.ones_like(ids).bool())
    gates = {3: torch.tensor([True, False, False, True])}
    with fix_gates(model, gates):  # fixed before the prefill, and still
        cache = model(ids[:, :10], use_cache=True).past_key_values
        model(ids[:, 10:11], past_key_values=cache)
    model(ids[:, 11:12], past_key_values=cache)  # afterwards the cache knows
    assert torch.equal(last(model, "gate")[1], gates[3].float())


def test_an_averaged_model_can_be_made_after_a_training_forward():
    model = build_routed().train()
    model(tokens(), use_cache=False)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(router_parameters(averaged.module)[0], router_parameters(model)[0])


def test_keep_ratio_is_that_of_the_last_forward():
    model = build_routed()
    with fix_gates(model, dict.fromkeys(ROUTED, False)):
        model(tokens())
    assert keep_ratio(model) == 0


@torch.no_grad()
def test_rows_that_leave_with_the_open_gates_leave_the_length_behind():
    """Of a layer that is the first of its kind, whose length all masks of that kind are made from."""
    dense = build("gemma2")
    model, ids = add_mindskip(build("gemma2"), MindSkipConfig((1, 2))), tokens(rows=2, length=12)
    with fix_gates(model, {1: torch.tensor([True, False]), 2: True}):
        expected = model(ids).logits[1, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 1]))
    found = model(ids[[1, 1], -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected.expand(2, -1), atol=1e-4, rtol=1e-3)  # another order of sums
    assert (dense(ids).logits[1, -1] - expected).abs().max() > 0.01


@torch.no_grad()
def test_mixed_rows_under_autocast():
    model, ids = build_routed(), tokens()
    with fix_gates(model, {2: torch.tensor([True, False, True, False])}):
        expected = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids).logits
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()  # bfloat16 has 8 bits


def test_embeddings_vote_all_of_them(monkeypatch):
    model, seen = build_routed(), []
    record_votes(monkeypatch, seen)
    ids = tokens(length=9)
    expected = generate(model, ids)[:, 9:]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(
        generate(model, None, inputs_embeds=embeddings, attention_mask=torch.ones_like(ids)), expected
    )
    assert all(one.all() and one.shape == (4, 9) for one in seen)


@torch.no_grad()
def test_a_routed_call_inside_another_keeps_its_own_voters():
    outer, inner, found = build_routed(), build_routed(), []
    ids, mask = tokens(seed=1), torch.ones(4, 20, dtype=torch.long)
    mask[:, :9] = 0
    expected = inner(ids, attention_mask=mask).logits
    outer.model.layers[0].register_forward_hook(
        lambda *_: found.append(inner(ids, attention_mask=mask).logits)
    )
    outer(tokens())
    assert torch.equal(found[0], expected)
    assert not torch.equal(inner(ids, voters=mask == 0).logits, expected)  # who votes shows


def test_a_routed_model_that_is_asked_while_another_generates_decides_by_its_own_prompt():
    """As in contrastive decoding: a logits processor asks a second model, of a shorter and a longer text."""
    outer, inner = build(), build_routed()
    add_mindskip(outer, routers(inner)[0].config)  # the same configuration doesn't make it the same model
    texts = [tokens(length=5, seed=1), tokens(length=30, seed=2)]
    with torch.no_grad():
        expected = [inner(text).logits for text in texts]
    found = []

    def ask(ids, scores):
        found.append([inner(text).logits for text in texts])
        return scores

    generate(outer, tokens(), logits_processor=transformers.LogitsProcessorList([ask]))
    assert len(found) == 8
    assert all(torch.equal(one, right) for logits in found for one, right in zip(logits, expected))


@pytest.mark.parametrize("length", [12, 30])  # shorter and longer than the prompt
def test_guidance_is_refused(length):
    negative = {"negative_prompt_ids": tokens(length=length), "guidance_scale": 1.5}
    with pytest.raises(ValueError, match="guidance_scale"):
        generate(build_routed(), tokens(), **negative)
    settings, model = transformers.GenerationConfig(guidance_scale=1.5, max_new_tokens=2), build_routed()
    with pytest.raises(ValueError, match="guidance_scale"):
        model.generate(tokens(), settings)
    model.generation_config.guidance_scale = 1.5  # the model's own
    with pytest.raises(ValueError, match="guidance_scale"):
        generate(model, tokens())


@torch.no_grad()
def test_fixed_gates_need_no_voters():
    model, ids = build_routed(), tokens()
    four = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].expand(4, 1, 20, 20)
    mask = torch.ones_like(ids)
    mask[2] = 0  # a row of padding alone
    packed = torch.arange(20).remainder(10)[None].expand(4, -1)
    for given in ({"attention_mask": four}, {"attention_mask": mask}, {"position_ids": packed}):
        with pytest.raises(ValueError, match="voters"):
            model(ids, **given)
        with fix_gates(model, dict.fromkeys(ROUTED, False)):
            model(ids, **given)


@torch.no_grad()
def test_gates_of_an_mlp_s_tokens_go_with_any_cache():
    """They need no memory. Gates of sequences need a new, growing cache."""
    ids, models = tokens(), {}
    for granularity in ("mlp-token", "mlp-sequence"):
        models[granularity] = add_mindskip(build(), MindSkipConfig(ROUTED, granularity))
        torch.manual_seed(1)
        for router in routers(models[granularity]):
            router.weight.data.copy_(4.0 * torch.randn(WIDTH))
    caches = [
        {"past_key_values": transformers.StaticCache(config=build().config, max_cache_len=32)} for _ in "ab"
    ]
    model = models["mlp-token"]
    found = torch.cat([model(part, **caches[0]).logits for part in ids.split([15, 5], 1)], 1)
    torch.testing.assert_close(found, model(ids).logits, atol=1e-4, rtol=1e-3)  # another order of sums
    assert 0 < keep_ratio(model) < 1
    with pytest.raises(ValueError, match="not static"):
        models["mlp-sequence"](ids, **caches[1])
