"""What is gated (attention, an MLP, a whole layer), and what shares a gate (a sequence, a token)."""

import itertools
import math

import pytest
import torch
import transformers
from conftest import FAMILIES, ROUTED, SHAPE, WIDTH, build, tokens
from test_tune import ESTIMATORS, examples, recorded_gradients, settings

import evaluate
import mindskip
import tune
from mindskip import (
    GRANULARITIES,
    MindSkipConfig,
    _routed_cache_layer,
    add_mindskip,
    fix_gates,
    keep_ratio,
    last,
    load_routers,
    remove_mindskip,
    router_parameters,
    routers,
    save_routers,
)

OTHERS = [name for name in GRANULARITIES if name != "attention-sequence"]  # that one has test_mindskip.py
CLOSE = {
    "rtol": 1e-4,
    "atol": 2e-5,
}  # float32, other shapes: sums of up to 64 terms in another order, 6 layers


def build_gated(granularity: str, family: str = "llama", **changes) -> torch.nn.Module:
    """Random routers, large enough to keep scores away from the threshold."""
    model = add_mindskip(build(family, **changes), MindSkipConfig(ROUTED, granularity))
    torch.manual_seed(1)
    for router in routers(model):
        router.weight.data.copy_(4.0 * torch.randn(WIDTH))
    return model


def thinned(model, ids: torch.Tensor, gates: dict[int, torch.Tensor], what: str, sees=None) -> torch.Tensor:
    """An independent reference, Llama alone: one row, by hand; in a routed layer, skipped tokens aren't there.

    gates: {layer: (T,) bool}. sees: (T, T) bool, what a token may see; None: itself and those before it.
    """
    sees = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() if sees is None else sees
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    everything = torch.arange(ids.shape[1])

    def attend(layer, x, at):
        normed = layer.input_layernorm(x[:, at])
        if len(at):
            x[:, at] += layer.self_attn(
                hidden_states=normed,
                position_embeddings=(cos[:, at], sin[:, at]),
                attention_mask=sees[at][:, at][None, None],
            )[0]

    def transform(layer, x, at):
        if len(at):
            x[:, at] += layer.mlp(layer.post_attention_layernorm(x[:, at]))

    for i, layer in enumerate(decoder.layers):
        kept = everything[gates[i]] if i in gates else everything
        hidden = hidden.clone()
        attend(layer, hidden, everything if what == "mlp" else kept)
        transform(layer, hidden, everything if what == "attention" else kept)
    return model.lm_head(decoder.norm(hidden))


def decisions(model) -> dict[int, torch.Tensor]:
    return dict(zip([router.layer for router in routers(model)], last(model, "gate").bool().clone()))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_a_row_equals_the_reference_in_which_skipped_tokens_are_not_there(granularity):
    model = build_gated(granularity)
    seen = set()
    for seed in range(4):
        ids = tokens(rows=1, seed=seed)
        found = model(ids).logits
        gates = {i: gate[0].expand(20) for i, gate in decisions(model).items()}
        seen |= {int(gate.sum()) for gate in gates.values()}
        remove_mindskip(model)
        expected = thinned(model, ids, gates, granularity.split("-")[0])
        dense = model(ids).logits
        again = build_gated(granularity)
        add_mindskip(model, MindSkipConfig(ROUTED, granularity))
        for router, same in zip(routers(model), routers(again)):
            router.weight.data.copy_(same.weight)
        torch.testing.assert_close(found, expected, **CLOSE)
        if any(not gate.all() for gate in gates.values()):
            assert (found - dense).abs().max() > 0.01  # a skipped one shows
    assert len(seen) > 1


@pytest.mark.parametrize("granularity", ["attention-token", "block-token"])
@torch.no_grad()
def test_a_mask_that_lets_tokens_look_ahead_is_followed(granularity):
    """As for a prefix, or the tokens of an image: they see each other, later ones too."""
    model, ids, sees = build_gated(granularity), tokens(rows=1), torch.ones(20, 20).tril().bool()
    sees[:12, :12] = True
    given = {"attention_mask": sees[None, None], "voters": torch.ones_like(ids).bool(), "use_cache": False}
    found, gates = model(ids, **given).logits, {i: gate[0] for i, gate in decisions(model).items()}
    assert 0 < keep_ratio(model) < 1
    torch.testing.assert_close(model.train()(ids, **given).logits, found, **CLOSE)
    remove_mindskip(model.eval())
    what = granularity.split("-")[0]
    torch.testing.assert_close(found, thinned(model, ids, gates, what, sees), **CLOSE)
    assert (found - thinned(model, ids, gates, what)).abs().max() > 0.01  # to look ahead shows


@pytest.mark.parametrize("granularity", ["attention-sequence", "mlp-sequence", "block-sequence"])
@torch.no_grad()
def test_training_and_evaluation_agree_under_autocast_to_the_last_bit(granularity, family):
    model, ids = build_gated(granularity, family), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        found, gates = model(ids, use_cache=False).logits, last(model, "gate")
        masked = model.train()(ids, use_cache=False).logits
    assert 0 < keep_ratio(model) < 1 and torch.equal(last(model, "gate"), gates)
    assert torch.equal(masked, found)


@pytest.mark.parametrize("granularity", OTHERS)
@torch.no_grad()
def test_training_and_evaluation_agree(granularity, family):
    """The masked training form computes everything; evaluation only what is kept. Padded on the left."""
    model = build_gated(granularity, family)
    ids, mask = tokens(), torch.ones(4, 20, dtype=torch.long)
    mask[1, :7], mask[3, :12] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    found, gates = model(**given).logits, last(model, "gate")
    assert 0 < keep_ratio(model) < 1
    masked = model.train()(**given, use_cache=False).logits
    assert last(model, "gate").nan_to_num(2).equal(gates.nan_to_num(2))
    torch.testing.assert_close(found[mask > 0], masked[mask > 0], **CLOSE)
    for row in range(4):  # and so do rows alone, without padding
        alone = model.eval()(ids[row : row + 1, mask[row] > 0]).logits
        torch.testing.assert_close(found[row, mask[row] > 0], alone[0], **CLOSE)


@pytest.mark.parametrize("is_padded", [True, False])  # without padding there may be no mask at all
@pytest.mark.parametrize("granularity", OTHERS)
@torch.no_grad()
def test_cached_decoding_equals_the_uncached_forward(granularity, family, is_padded):
    model = build_gated(granularity, family)
    ids, mask = tokens(length=24), torch.ones(4, 24, dtype=torch.long)
    if is_padded:
        mask[1, :7], mask[3, :12] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, found, fixed = None, [], {}
    for start, end in [(0, 16), (16, 17), (17, 18), (18, 21), (21, 24)]:  # prefill, tokens, chunks
        given = {"attention_mask": mask[:, :end]} if is_padded else {}
        given |= {"position_ids": places[:, start:end], "past_key_values": cache, "use_cache": True}
        output = model(ids[:, start:end], **given)
        cache = output.past_key_values
        found.append(output.logits)
        if start == 0 and granularity.endswith("sequence"):
            fixed = decisions(model)  # kept with the cache
    with fix_gates(model, fixed):
        whole = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, 1)[mask > 0], whole[mask > 0], **CLOSE)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_open_gates_reproduce_the_base_model_bit_for_bit(granularity, family):
    model, ids = build(family), tokens()
    with torch.no_grad():
        expected, generated = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
        names = set(model.state_dict())
        add_mindskip(model, MindSkipConfig(ROUTED, granularity))
        assert len(set(model.state_dict()) - names) == len(ROUTED)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
        trained = model.train()(ids, use_cache=False).logits
        assert keep_ratio(model.eval()) == 1.0
        torch.testing.assert_close(trained, expected, **CLOSE)
        assert torch.equal(remove_mindskip(model)(ids).logits, expected)
        assert set(model.state_dict()) == names


@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_closed_gates_call_nothing_and_cache_nothing(granularity, monkeypatch):
    model, calls = build_gated(granularity), []
    what = granularity.split("-")[0]
    for name in ("self_attn", "mlp", "input_layernorm"):  # all norms are of one class
        kind = type(getattr(model.model.layers[0], name))

        def counted(self, *args, original=kind.forward, name=name, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    with fix_gates(model, dict.fromkeys(ROUTED, False)):
        cache = model(tokens()).past_key_values
        model(tokens(length=1), past_key_values=cache)
    assert keep_ratio(model) == 0.0
    assert calls.count("self_attn") == 2 * (6 if what == "mlp" else 3)
    assert calls.count("mlp") == 2 * (6 if what == "attention" else 3)
    # The norm of what is skipped is skipped, too.
    assert calls.count("input_layernorm") == 2 * (7 if what == "block" else 10)
    assert [layer.is_initialized for layer in cache.layers] == [
        i not in ROUTED or what == "mlp" for i in range(6)
    ]
    assert cache.get_seq_length(3) == 21


@pytest.mark.parametrize("granularity", [name for name in GRANULARITIES if name.endswith("token")])
@torch.no_grad()
def test_only_kept_tokens_are_computed_and_cached(granularity, monkeypatch):
    model, sizes = build_gated(granularity), []
    what, ids = granularity.split("-")[0], tokens(rows=1)
    kind = type(model.model.layers[0].mlp if what == "mlp" else model.model.layers[0].self_attn)
    original = kind.forward

    def counted(self, *args, **kwargs):
        sizes.append((args[0] if args else kwargs["hidden_states"]).shape[:2])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    cache = model(ids).past_key_values
    kept = last(model, "gate").sum((1, 2)).int().tolist()
    assert sizes == [(1, count) for count in (20, 20, *kept, 20)] and 0 < min(kept) < max(kept)
    if what != "mlp":
        assert [cache.layers[i].keys.shape[2] for i in ROUTED] == kept
    sizes.clear()
    with fix_gates(model, dict.fromkeys(ROUTED, torch.tensor([True, False, True, False]))):
        model(tokens())
    assert sizes == [(4, 20), (4, 20), (2, 20), (2, 20), (2, 20), (4, 20)]


@torch.no_grad()
def test_a_step_of_decoding_copies_no_keys_where_every_row_keeps_its_token(monkeypatch):
    model, copied, update = build_gated("attention-token"), [], mindskip._RoutedCacheLayer.update

    def watched(self, *args, **kwargs):
        found = update(self, *args, **kwargs)
        copied.append(found[0] is not self.keys or found[1] is not self.values)
        return found

    cache = model(tokens()).past_key_values
    monkeypatch.setattr(mindskip._RoutedCacheLayer, "update", watched)
    with fix_gates(model, dict.fromkeys(ROUTED, True)):
        model(tokens(length=1), past_key_values=cache)
    assert copied == [False] * 3


@pytest.mark.parametrize("granularity", [name for name in GRANULARITIES if name.endswith("token")])
@torch.no_grad()
def test_a_token_decides_without_those_after_it_and_padding_never_counts(granularity):
    model, ids = build_gated(granularity), tokens()
    model(ids)
    gates = last(model, "gate")  # (layers, B, T)
    other = torch.cat([ids[:, :12], tokens(length=8, seed=9)], 1)
    model(other)
    assert torch.equal(last(model, "gate")[..., :12], gates[..., :12])
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0  # on the right
    model(ids, attention_mask=mask)
    assert last(model, "gate")[:, 0, 15:].isnan().all()
    kept, real = last(model, "gate").nansum().item(), 3 * int(mask.sum())
    assert keep_ratio(model) == pytest.approx(kept / real)
    assert torch.equal(last(model, "gate")[:, 1:], gates[:, 1:])
    with fix_gates(model, dict.fromkeys(ROUTED, True)):
        cache = model(ids[:1], attention_mask=mask[:1]).past_key_values
    cached = 20 if granularity == "mlp-token" else 15  # padding is skipped even where gates are fixed
    assert [cache.layers[i].keys.shape[2] for i in ROUTED] == [cached] * 3


@pytest.mark.parametrize("granularity", OTHERS)
@torch.no_grad()
def test_generation_equals_greedy_decoding_that_recomputes_everything(granularity):
    model, ids = build_gated(granularity), tokens()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
    for row in range(4):
        alone = model.generate(ids[row : row + 1], **options | {"attention_mask": mask[row : row + 1]})
        assert torch.equal(alone[0], cached[row])


@pytest.mark.parametrize("granularity", OTHERS)
def test_cache_operations_keep_decisions_with_their_rows(granularity):
    model, ids, more = build_gated(granularity), tokens(), tokens(length=3, seed=4)
    with torch.no_grad():
        for operate, index in [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0, 3])), [2, 0, 0, 3]),
            (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
        ]:
            cache = model(ids).past_key_values
            expected = [
                model(more[:1], past_key_values=model(ids[i : i + 1]).past_key_values).logits for i in index
            ]
            operate(cache)
            found = model(more[:1].expand(len(index), -1), past_key_values=cache).logits
            torch.testing.assert_close(found, torch.cat(expected), **CLOSE)
        cache = model(ids).past_key_values
        model(more, past_key_values=cache)
        cache.crop(-3)
        found = model(more, past_key_values=cache).logits
        again = model(more, past_key_values=model(ids).past_key_values).logits
        torch.testing.assert_close(found, again, **CLOSE)
        cache.crop(-23)
        torch.testing.assert_close(model(more, past_key_values=cache).logits, model(more).logits, **CLOSE)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("granularity", OTHERS)
def test_closed_gates_get_a_gradient(granularity):
    model = add_mindskip(
        build(), MindSkipConfig(ROUTED, granularity, threshold=0.6)
    )  # zero routers score 0.5
    model.train()(tokens(), labels=tokens(), voters=tokens() > 0).loss.backward()
    assert keep_ratio(model) == 0
    assert all(weight.grad.abs().max() > 0 for weight in router_parameters(model))


@pytest.mark.parametrize("granularity", OTHERS)
def test_routers_of_every_granularity_are_saved_and_loaded(granularity, tmp_path):
    model, ids = build_gated(granularity), tokens()
    save_routers(model, tmp_path / "routers.safetensors")
    loaded = load_routers(build(), tmp_path / "routers.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert routers(loaded)[0].config.granularity == granularity


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("granularity", OTHERS)
def test_tuning_does_not_depend_on_how_a_step_is_cut_up(granularity, estimator):
    """Alone, a prompt is not padded: padding must not enter gradients, gates or the keep ratio."""
    found = []
    for size in (8, 1):
        model, log = build_gated(granularity).requires_grad_(False), []
        for router in routers(model):
            router.weight.data.div_(8)
        args = settings(
            steps=2,
            batch_size=8,
            micro_batch_size=size,
            estimator=estimator,
            lr=0.01,
            granularity=granularity,
            logit_weight=0.5,
        )
        with recorded_gradients(model) as gradients:
            tune.tune(model, examples(), args, report=lambda *step, log=log: log.append(step[1:3]))
        found.append((torch.tensor(log), torch.stack(gradients[0])))
    assert 0 < found[0][0][0, 1] < 1 and found[0][1].abs().max() > 1e-3
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_router_of_a_block_sees_its_input_normalised():
    model, ids, seen = build_gated("block-sequence"), tokens(), {}
    for i in ROUTED:
        model.model.layers[i].register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0]}))
    with fix_gates(model, dict.fromkeys(ROUTED, True)):
        model(ids)
    model(ids)
    x = seen[2] / seen[2].square().mean(-1, keepdim=True).sqrt()  # layer 2 sees the same in both
    torch.testing.assert_close(last(model, "logit")[0], x.mean(1) @ routers(model)[0].weight, **CLOSE)


@pytest.mark.parametrize("granularity", OTHERS)
@torch.no_grad()
def test_eager_attention_agrees_with_sdpa(granularity):
    ids, mask = tokens(), torch.ones(4, 20, dtype=torch.long)
    mask[2, 14:] = 0
    found = [
        build_gated(granularity, attn_implementation=name)(ids, attention_mask=mask).logits
        for name in ("eager", "sdpa")
    ]
    torch.testing.assert_close(found[0][mask > 0], found[1][mask > 0], **CLOSE)


def test_what_cannot_be_left_out_is_refused():
    for family, what in itertools.product(FAMILIES, ("mlp", "block")):
        model = build(family)
        before = {name: type(module) for name, module in model.named_modules()}
        try:
            add_mindskip(model, MindSkipConfig(ROUTED, f"{what}-sequence"))
            remove_mindskip(model)
        except ValueError as error:
            assert f"has no {what} that can be left out" in str(error)
        assert {name: type(module) for name, module in model.named_modules()} == before
    model = build("gpt_oss")  # its MLP gives two values, and has a router of its own
    with pytest.raises(ValueError, match="GptOssDecoderLayer.* has no mlp that can be left out"):
        add_mindskip(model, MindSkipConfig(ROUTED, "mlp-token"))


# ---- what a reader with hostile eyes found ----


@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_a_multimodal_wrapper_does_not_hide_padding_or_the_prompt(granularity):
    """Gemma 3's gives its text model masks that are made already, and embeddings."""
    text = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=63,
        mm_tokens_per_image=4,
        boi_token_index=61,
        eoi_token_index=62,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    add_mindskip(model, MindSkipConfig(ROUTED, granularity))
    for router in routers(model):
        router.weight.data.copy_(2.0 * torch.randn(WIDTH))
    for seed in range(4):
        ids = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(seed))
        model(ids)
        gates = last(model, "gate")
        padded, mask = torch.cat([torch.full((1, 9), 5), ids], 1), torch.ones(1, 21, dtype=torch.long)
        mask[:, :9] = 0
        model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        found = last(model, "gate")
        assert torch.equal(found if found.ndim == 2 else found[..., 9:], gates)
        assert gates.isfinite().all() and found.isnan().sum() == (0 if found.ndim == 2 else 9 * len(found))
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        assert torch.equal(
            model.generate(padded, **options), model.generate(padded, use_cache=False, **options)
        )


@pytest.mark.parametrize("granularity", ["attention-token", "block-token"])
@torch.no_grad()
def test_keys_and_values_may_differ_in_size(granularity):
    """Multi-head latent attention, in a batch in which a row keeps nothing."""
    sizes = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 6,
    }
    config = transformers.DeepseekV3Config(**SHAPE | {"num_key_value_heads": 4} | sizes | experts)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    add_mindskip(model, MindSkipConfig(ROUTED, granularity))
    ids, gates = tokens(), dict.fromkeys(ROUTED, torch.tensor([True, False, True, False]))
    with fix_gates(model, gates):
        cache = model(ids[:, :16]).past_key_values
        found = model(ids[:, 16:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits[:, 16:], **CLOSE)


@torch.no_grad()
def test_what_a_skipped_block_cannot_give_is_refused():
    model, ids = build_gated("block-token"), tokens()
    with pytest.raises(ValueError, match="output_hidden_states: what a gate skips"):
        model(ids, output_hidden_states=True)
    assert len(model.train()(ids, output_hidden_states=True, use_cache=False).hidden_states) == 7
    with pytest.raises(ValueError, match="output_router_logits: what a gate skips"):
        build_gated("block-token", "mixtral")(ids, output_router_logits=True)
    offloaded = transformers.DynamicCache(config=model.config)
    offloaded.offloading = True
    with pytest.raises(ValueError, match="routing needs a new DynamicCache"):
        _routed_cache_layer(offloaded, routers(model)[0], 20)  # the model itself would need CUDA's streams
    cache = model.eval()(ids).past_key_values
    with pytest.raises(ValueError, match="routing needs a new DynamicCache"):  # of another granularity
        model(ids[:, :1], past_key_values=build_gated("block-sequence")(ids).past_key_values)
    with pytest.raises(ValueError, match="a routed model made this KV cache"):
        remove_mindskip(model)(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="eager or sdpa"):
        add_mindskip(build("llama4", attn_temperature_tuning=True), MindSkipConfig(ROUTED, "attention-token"))


@torch.no_grad()
def test_kept_tokens_of_the_prompt_are_counted_not_those_of_decoding():
    model, ids = build_gated("attention-token"), tokens(rows=1, length=40)
    args = evaluate.parse_arguments(["--new-tokens", "4", "--repeats", "2"])
    found = evaluate.compare_cost(build(), model, {"mindskip": {}}, ids, 1, args)["mindskip"]["kept"]
    model(ids)
    assert found == {i: pytest.approx(gate.float().mean().item()) for i, gate in decisions(model).items()}
    assert 0 < min(found.values()) < max(found.values()) < 1


@torch.no_grad()
def test_gates_drawn_for_each_token_are_those_of_its_row():
    """The row `random`, in batches of other rows, and alone."""
    model, some = build_gated("attention-token"), examples()
    longest = max(len(one["ids"]) for one in some)
    drawn = {i: torch.rand(len(some), longest) < 0.5 for i in ROUTED}
    found = evaluate.score_all(model, some, drawn, batch_size=3)
    assert ((found["gates"] > 0) & (found["gates"] < 1)).float().mean() > 0.9
    for k, one in enumerate(some):
        alone = evaluate.score_all(model, [one], {i: gate[k : k + 1] for i, gate in drawn.items()})
        torch.testing.assert_close(alone["nats"][0], found["nats"][k], **CLOSE)
        torch.testing.assert_close(alone["gates"][0], found["gates"][k])


@pytest.mark.parametrize("granularity", ["attention-sequence", "attention-token"])
def test_a_router_that_is_not_a_number_is_not_taken_for_padding(granularity):
    """Padding's gates are noted as NaN, too."""
    model = build_gated(granularity).requires_grad_(False)
    router_parameters(model)[1].data.fill_(torch.nan)
    assert math.isnan(tune.calibrate(model, examples(), 0.5))
    assert math.isnan(keep_ratio(model)) == (granularity == "attention-sequence")
    with pytest.raises(FloatingPointError, match="step 1: loss or gradient not finite"):
        tune.tune(model, examples(), settings(steps=1, batch_size=8, granularity=granularity))


@torch.no_grad()
def test_attention_weights_are_whole_where_mlps_are_skipped():
    model, ids = build_gated("mlp-sequence", attn_implementation="eager"), tokens()
    with fix_gates(model, dict.fromkeys(ROUTED, torch.tensor([True, False, True, False]))):
        weights = model(ids, output_attentions=True).attentions
    assert [one.shape for one in weights] == [(4, 4, 20, 20)] * 6
