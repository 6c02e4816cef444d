"""The method: what holds always, on tiny random models of several families."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from conftest import LAYERS, ROUTED, WIDTH, build, build_routed, tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import mindskip
from mindskip import (
    MindSkipConfig,
    add_mindskip,
    capacity_loss,
    fix_gates,
    keep_ratio,
    last,
    load_routers,
    remove_mindskip,
    router_parameters,
    routers,
    save_routers,
    straight_through,
)

MIXED = {
    2: torch.tensor([1, 0, 1, 0]).bool(),
    3: torch.tensor([0, 0, 1, 1]).bool(),
    4: torch.tensor([0, 0, 0, 0]).bool(),
}
CLOSED = dict.fromkeys(ROUTED, False)


def count_calls(monkeypatch, module) -> list:
    """Record every forward of the class of `module`, wherever an instance of it hangs."""
    calls, original = [], type(module).forward

    def forward(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(module), "forward", forward)
    return calls


def without_attention(model, layers):
    """An independent reference: zero the output projection, so that attention adds nothing."""
    reference = copy.deepcopy(model)
    for i in layers:
        for name, parameter in reference.model.layers[i].self_attn.named_parameters():
            if name.startswith(("o_proj", "dense")):
                parameter.data.zero_()
    return reference


def greedy_uncached(model, prompt, steps, mask=None):
    """Greedy decoding that recomputes everything at every step, under gates fixed from outside."""
    mask = torch.ones_like(prompt) if mask is None else mask
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(prompt, attention_mask=mask, position_ids=positions, use_cache=False).logits
        prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return prompt


def decisions(model) -> dict[int, torch.Tensor]:
    return dict(
        zip([router.layer for router in routers(model)], last(model, "gate").bool().clone(), strict=True)
    )


# ---- the straight-through step ----


def test_gate_is_exactly_zero_or_one():
    score = torch.cat([torch.rand(10_000), torch.tensor([0.0, 0.5, 1.0])]).requires_grad_()
    gate = straight_through(score, 0.3)
    assert torch.equal(gate, (score >= 0.3).float())  # bit for bit, not merely close


def test_straight_through_gradient_is_that_of_the_sigmoid():
    x, voters = torch.randn(5, 7, WIDTH), torch.rand(5, 7) > 0.4
    voters[:, 0] = True
    router = mindskip.Router(2, MindSkipConfig((2,)), WIDTH)
    router.weight.data.normal_()
    upstream = torch.randn(5)
    (straight_through(torch.sigmoid(router(x, voters)), 0.5).flatten() * upstream).sum().backward()
    # By hand: dL/dw = sum_b dL/dm_b * s_b (1 - s_b) * mean of row b over its voters.
    expected = torch.zeros(WIDTH)
    for b in range(5):
        mean = torch.stack([x[b, t] for t in range(7) if voters[b, t]]).mean(0)
        s = 1 / (1 + torch.exp(-(mean @ router.weight.detach())))
        expected += upstream[b] * s * (1 - s) * mean
    torch.testing.assert_close(router.weight.grad, expected)


def test_closed_gates_get_a_gradient():
    model = add_mindskip(build(), MindSkipConfig(ROUTED, threshold=0.6)).train()  # zero routers score 0.5
    model(tokens(), labels=tokens(), voters=tokens() > 0).loss.backward()
    assert keep_ratio(model) == 0
    assert all(weight.grad.abs().max() > 0 for weight in router_parameters(model))


# ---- the wrapper ----


def test_open_gates_reproduce_the_base_model_bit_for_bit(family):
    model, ids = build(family), tokens()
    expected = model(ids).logits
    add_mindskip(model, MindSkipConfig(ROUTED))
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.train()(ids, use_cache=False).logits, expected)
    assert keep_ratio(model) == 1.0


def test_closed_gate_equals_removed_attention_and_calls_nothing(family, monkeypatch):
    model, ids = build(family), tokens()
    expected = without_attention(model, ROUTED)(ids).logits
    add_mindskip(
        model, MindSkipConfig(ROUTED)
    )  # no .eval() here: it must come attached in the mode of its model
    attention_calls = count_calls(monkeypatch, model.model.layers[0].self_attn)
    norms = [norm for i in ROUTED for norm in model.model.layers[i].self_attn.own_norm]
    norm_calls = count_calls(monkeypatch, norms[0]) if norms else []
    with fix_gates(model, CLOSED):
        output = model(ids)
    torch.testing.assert_close(output.logits, expected)  # zeros added, or zeros times weights: rounding only
    assert len(attention_calls) == LAYERS - len(ROUTED)
    assert not any(call is norm for call in norm_calls for norm in norms)
    assert (norms == []) == (family in ("olmo2", "cohere"))
    for i in ROUTED:
        assert not output.past_key_values.layers[i].is_initialized
    assert keep_ratio(model) == 0.0


def test_rows_of_a_mixed_batch_equal_each_row_alone(family):
    model, ids = build_routed(family), tokens()
    with fix_gates(model, MIXED):
        together = model(ids).logits
    for b in range(len(ids)):
        with fix_gates(model, {i: bool(gate[b]) for i, gate in MIXED.items()}):
            # 1e-5: a matrix product over other row counts may add up in another order (experts do).
            torch.testing.assert_close(model(ids[b : b + 1]).logits[0], together[b], atol=1e-5, rtol=1e-5)


def test_training_and_inference_give_the_same_logits(family):
    model, ids = build_routed(family), tokens()
    inference, at_inference = model(ids).logits, decisions(model)
    training = model.train()(ids, use_cache=False).logits
    assert all(torch.equal(gate, at_inference[i]) for i, gate in decisions(model).items())
    assert 0 < keep_ratio(model) < 1  # else this would compare nothing
    torch.testing.assert_close(training, inference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_gate(side):
    model, ids = build_routed(), tokens()
    model(ids)
    alone = decisions(model)
    padding = torch.zeros(4, 9, dtype=torch.long)
    parts, masks = [ids, padding], [torch.ones_like(ids), padding]
    order = slice(None, None, -1) if side == "left" else slice(None)
    padded, mask = torch.cat(parts[order], 1), torch.cat(masks[order], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert all(torch.equal(gate, alone[i]) for i, gate in decisions(model).items())
    torch.testing.assert_close(logits[mask.bool()], model(ids).logits.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_answers_do_not_vote():
    model, ids = build_routed(), tokens(length=20)
    voters = torch.zeros_like(ids).bool()
    voters[:, :12] = True
    labels = ids.masked_fill(voters, -100)
    model(ids[:, :12])
    prompt_only = decisions(model)
    for arguments in (
        {"voters": voters},
        {"labels": labels},
        {"voters": voters, "attention_mask": torch.ones_like(ids)},
    ):
        for suffix in (1, 2, 3):
            other = torch.cat([ids[:, :12], tokens(seed=suffix)[:, 12:]], 1)
            for mode in (model.eval(), model.train()):
                mode(other, use_cache=False, **arguments)
                assert all(torch.equal(gate, prompt_only[i]) for i, gate in decisions(model).items())
    model(ids)  # and they would matter
    assert any(not torch.equal(gate, prompt_only[i]) for i, gate in decisions(model).items())


def test_voters_reach_no_further_than_the_forward_that_they_came_with():
    model, ids = build_routed(), tokens()
    model(ids)
    expected = decisions(model)
    some = torch.zeros_like(ids).bool()
    some[:, 3] = True
    model(ids, voters=some)
    assert any(not torch.equal(gate, expected[i]) for i, gate in decisions(model).items())
    model.model(ids)  # the decoder itself, not the model that was told who votes
    assert all(torch.equal(gate, expected[i]) for i, gate in decisions(model).items())


def test_a_row_without_voters_is_refused():
    model, ids = build_routed(), tokens()
    mask = torch.ones_like(ids)
    mask[2] = 0
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"\(4, 20\), got torch.bool \(4, 19\)"):
        model(ids, voters=mask[:, 1:].bool())


def test_one_token_prompt():
    model = build_routed()
    ids = tokens(length=1)
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    with fix_gates(model, decisions(model)):
        assert torch.equal(generated, greedy_uncached(model, ids, 5))


# ---- decisions live with the cache ----


def test_cached_generation_equals_the_uncached_forward(family):
    model, ids = build_routed(family), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :3] = 0, 0  # ragged
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    gates = decisions(model)
    assert 0 < keep_ratio(model) < 1
    with fix_gates(model, gates):
        assert torch.equal(generated, greedy_uncached(model, ids, 12, mask))


def test_cached_generation_with_every_gate_closed(family):
    # Gemma 3 sizes its full-attention mask by layer 2, which holds no keys then.
    model, ids = build_routed(family), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # without padding no mask is made
    with fix_gates(model, CLOSED):
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert torch.equal(generated, greedy_uncached(model, ids, 6, mask))


def test_decoding_calls_no_router(monkeypatch):
    model, ids = build_routed(), tokens()
    calls = count_calls(monkeypatch, routers(model)[0])
    cache = model(ids).past_key_values
    assert len(calls) == len(ROUTED)
    for i in range(3):
        model(tokens(length=2, seed=i), past_key_values=cache)
    assert len(calls) == len(ROUTED)
    assert cache.get_seq_length() == 26


def test_only_kept_rows_are_cached():
    model, ids = build_routed(), tokens()
    with fix_gates(model, MIXED):
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
    for i, gate in MIXED.items():
        layer = cache.layers[i]
        assert layer.keys is None if not gate.any() else layer.keys.shape[0] == gate.sum()
        assert layer.get_seq_length() == 21


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # there a routed layer is the first of its kind
@torch.no_grad()
def test_a_layer_that_is_left_without_rows_still_knows_the_length(name):
    model, ids, more = build_routed(name), tokens(), tokens(rows=2, length=3, seed=5)
    with fix_gates(model, MIXED):
        cache = model(ids).past_key_values
    cache.batch_select_indices(torch.tensor([1, 3]))  # closed in layer 2
    with fix_gates(model, {i: gate[[1, 3]] for i, gate in MIXED.items()}):
        expected = model(torch.cat([ids[[1, 3]], more], 1)).logits[:, 20:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)


def test_interleaved_generations_do_not_meet():
    model = build_routed()
    prompts = [tokens(rows=1, seed=seed) for seed in range(4)]
    expected = [
        model.generate(
            p, attention_mask=torch.ones_like(p), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        for p in prompts
    ]
    caches = [DynamicCache(config=model.config) for _ in prompts]
    sequences, inputs = list(prompts), list(prompts)
    patterns = set()
    for _ in range(6):
        for k in range(len(prompts)):
            token = model(inputs[k], past_key_values=caches[k]).logits[:, -1:].argmax(-1)
            patterns.add(tuple(last(model, "gate").flatten().tolist()))
            sequences[k], inputs[k] = torch.cat([sequences[k], token], 1), token
    assert len(patterns) > 1  # else they could not disturb each other
    for sequence, wanted in zip(sequences, expected):
        assert torch.equal(sequence, wanted)


def test_threads_that_share_a_model_do_not_meet():
    model, batches = build_routed(), []
    for seed in range(4):
        mask = torch.ones(3, 14, dtype=torch.long)
        for row in range(3):
            mask[row, : (3 * seed + 4 * row) % 11] = 0  # padded at the left, each batch in its own way
        batches.append((tokens(rows=3, length=14, seed=seed), mask))

    def generate(batch) -> torch.Tensor:
        ids, mask = batch
        return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)

    alone = [generate(batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds; threads take turns some hundred times in each forward pass
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(generate, batches * 10))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(found, alone[k % 4]) for k, found in enumerate(together))


def test_a_second_turn_and_a_later_chunk_follow_the_first_decision():
    model, ids, more = build_routed(), tokens(), tokens(length=7, seed=5)
    cache = model(ids).past_key_values
    gates = decisions(model)
    logits = model(more, past_key_values=cache).logits
    with fix_gates(model, gates):
        whole = model(torch.cat([ids, more], 1)).logits
    torch.testing.assert_close(logits, whole[:, 20:], atol=1e-5, rtol=1e-5)


def test_beam_search_with_mixed_decisions(family):
    model, ids = build_routed(family), tokens(rows=3)
    gates = {i: gate[:3] for i, gate in MIXED.items()}
    expanded = {i: gate.repeat_interleave(3) for i, gate in gates.items()}
    arguments = dict(max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=None)
    with fix_gates(model, expanded):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    for b in range(3):
        row = ids[b : b + 1]
        with fix_gates(model, {i: bool(gate[b]) for i, gate in gates.items()}):
            alone = model.generate(row, attention_mask=torch.ones_like(row), **arguments)
        assert torch.equal(alone[0], together[b])


def test_cache_rows_can_be_reordered_selected_and_repeated():
    model, ids, step = build_routed(), tokens(), tokens(length=1, seed=9)
    for change in ("reorder_cache", "batch_select_indices"):
        for index in ([3, 3, 0, 1], [2, 0], [1, 3]):
            with fix_gates(model, MIXED):
                cache = model(ids).past_key_values
            getattr(cache, change)(torch.tensor(index))
            got = model(step[: len(index)], past_key_values=cache).logits
            with fix_gates(model, {i: gate[index] for i, gate in MIXED.items()}):
                wanted = model(torch.cat([ids[index], step[: len(index)]], 1)).logits[:, -1:]
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    with fix_gates(model, MIXED):
        cache = model(ids).past_key_values
    cache.batch_repeat_interleave(2)
    index = [0, 0, 1, 1, 2, 2, 3, 3]
    got = model(step[[0] * 8], past_key_values=cache).logits
    with fix_gates(model, {i: gate[index] for i, gate in MIXED.items()}):
        wanted = model(torch.cat([ids[index], step[[0] * 8]], 1)).logits[:, -1:]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cropped_or_copied_cache_goes_on():
    model, ids, step = build_routed(), tokens(), tokens(length=1, seed=9)
    with fix_gates(model, MIXED):
        cache = model(ids).past_key_values
        copied = copy.deepcopy(cache)
        wanted = model(torch.cat([ids[:, :15], step], 1)).logits[:, -1:]
        whole = model(torch.cat([ids, step], 1)).logits[:, -1:]
    cache.crop(-5)
    torch.testing.assert_close(model(step, past_key_values=cache).logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(step, past_key_values=copied).logits, whole, atol=1e-5, rtol=1e-5)


def test_a_reset_cache_is_routed_anew():
    model, ids = build_routed(), tokens()
    with fix_gates(model, CLOSED):
        cache = model(ids).past_key_values
    cache.reset()
    logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits)
    assert keep_ratio(model) > 0


def test_caches_that_do_not_fit_are_refused():
    model, ids = build(), tokens()
    begun_dense = model(ids).past_key_values
    static = StaticCache(config=model.config, max_cache_len=64)
    add_mindskip(model, MindSkipConfig(ROUTED))
    with pytest.raises(ValueError, match="begun without routers"):
        model(ids, past_key_values=begun_dense)
    with pytest.raises(ValueError, match="not static"):
        model(ids, past_key_values=static)
    with fix_gates(model, MIXED):
        begun_routed = model(ids).past_key_values
    with pytest.raises(ValueError, match="training mode"):
        model.train()(ids, past_key_values=begun_routed)
    remove_mindskip(model.eval())
    with pytest.raises(ValueError, match="a routed model made this"):
        model(ids, past_key_values=begun_routed)


@pytest.mark.parametrize("mask", ["none", "two", "four"])
def test_attention_masks_of_every_kind(mask):
    model, ids = build_routed(), tokens()
    model(ids)
    expected = decisions(model)
    four = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].expand(4, 1, 20, 20)
    given = {"none": None, "two": torch.ones_like(ids), "four": four}[mask]
    if mask == "four":
        with pytest.raises(ValueError, match="pass voters"):
            model(ids, attention_mask=given)
    model(ids, attention_mask=given, voters=torch.ones_like(ids).bool() if mask == "four" else None)
    assert all(torch.equal(gate, expected[i]) for i, gate in decisions(model).items())


# ---- numbers ----


def test_bfloat16_model_keeps_float32_routers_and_exact_gates():
    model = build_routed().to(torch.bfloat16)
    weights = [w.clone() for w in router_parameters(build_routed())]
    for weight, before in zip(router_parameters(model), weights):
        assert torch.equal(weight, before) and weight.dtype == torch.float32
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(tokens())
        assert all(logit.dtype == torch.float32 for logit in mindskip.last(model, "logit"))
        assert set(last(model, "gate").flatten().tolist()) <= {0.0, 1.0}
    # A logit of -0.003 gives 0.49925, which bfloat16 rounds to 0.5: open.
    x = torch.ones(1, 3, WIDTH, dtype=torch.bfloat16)
    router = routers(model)[0]
    router.weight.data.fill_(-0.003 / WIDTH)
    assert straight_through(torch.sigmoid(router(x, torch.ones(1, 3).bool())), 0.5).item() == 0.0


def test_hidden_states_are_not_overwritten():
    model, ids = build_routed(), tokens()
    with fix_gates(model, MIXED):
        states = model(ids, output_hidden_states=True).hidden_states
        x, inputs = model.get_input_embeddings()(ids), []
        hooks = [
            layer.register_forward_pre_hook(lambda m, a: inputs.append(a[0].clone()))
            for layer in model.model.layers
        ]
        model(ids)
    assert torch.equal(states[0], x) and all(torch.equal(a, b) for a, b in zip(states, inputs))
    [hook.remove() for hook in hooks]


def test_frozen_lower_layers_record_no_graph():
    model = build_routed().train().requires_grad_(False)
    for weight in router_parameters(model):
        weight.requires_grad_(True)
    needs_grad = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, a, output: needs_grad.append(output.requires_grad))
    model(tokens(), use_cache=False)
    assert needs_grad == [False] * ROUTED[0] + [True] * (LAYERS - ROUTED[0])


def test_gradient_checkpointing_gives_the_same_gates_and_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, ids = build_routed().train(), tokens()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        voters = torch.zeros_like(ids).bool()
        voters[:, :12] = True
        loss = model(
            ids, labels=ids.masked_fill(voters, -100), voters=voters, use_cache=False
        ).loss + capacity_loss(model, 0.1)
        loss.backward()
        gradients.append([decisions(model), [w.grad for w in router_parameters(model)]])
    (gates, plain), (again, checkpointed) = gradients
    assert all(torch.equal(gates[i], again[i]) for i in gates)
    for a, b in zip(plain, checkpointed):
        torch.testing.assert_close(a, b)


# ---- what stays as it was ----


def test_nothing_of_the_base_model_is_renamed(family):
    model, dense, ids = build_routed(family), build(family), tokens()
    weights = [f"model.layers.{i}.self_attn.router.weight" for i in ROUTED]
    assert [name for name in model.state_dict() if name not in weights] == list(dense.state_dict())
    assert set(weights) < set(model.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        found = dict(getattr(model, kind)())
        assert [name for name in found if name not in weights] == [name for name, _ in getattr(dense, kind)()]
    added = {f"model.layers.{i}.self_attn.router" for i in ROUTED}
    modules = {name: module for name, module in model.named_modules() if name not in added}
    assert list(modules) == [name for name, _ in dense.named_modules()]
    for name, module in dense.named_modules():  # and is still what it was, by class and by name of the class
        assert (
            isinstance(modules[name], type(module)) and type(modules[name]).__name__ == type(module).__name__
        )
    expected = model(ids).logits
    model.load_state_dict(model.state_dict())
    for parameter in model.parameters():
        parameter.data.add_(1)
    model.load_state_dict(build_routed(family).state_dict())
    assert torch.equal(model(ids).logits, expected)
    for parameter in dense.parameters():  # another checkpoint of the dense model
        parameter.data.mul_(0.9)
    found = model.load_state_dict(dense.state_dict(), strict=False)
    assert found.missing_keys == weights and not found.unexpected_keys
    with fix_gates(model, dict.fromkeys(ROUTED, True)):
        assert torch.equal(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("place", ["mindskip.gated_module", "mindskip.Router.__init__"])
def test_attaching_is_all_or_nothing(place, monkeypatch):
    model, ids, calls = build(), tokens(), []
    expected, modules = model(ids).logits, [(id(module), type(module)) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    whole = mindskip.Router.__init__ if "Router" in place else mindskip.gated_module

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == len(ROUTED):
            raise RuntimeError("the last layer fails")
        return whole(*arguments)

    monkeypatch.setattr(place, failing)
    with pytest.raises(RuntimeError, match="the last layer fails"):
        add_mindskip(model, MindSkipConfig(ROUTED))
    monkeypatch.undo()
    assert [(id(module), type(module)) for module in model.modules()] == modules
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert not routers(model) and torch.equal(model(ids).logits, expected)
    assert torch.equal(add_mindskip(model, MindSkipConfig(ROUTED))(ids).logits, expected)


# ---- loss, gates from outside, saving ----


def test_capacity_loss_is_one_hinge_over_all_gates():
    model, ids = build_routed(), tokens()
    for mode in (model.eval(), model.train()):
        with fix_gates(model, MIXED):  # 4 of 12 open
            mode(ids, use_cache=False)
            assert keep_ratio(model) == pytest.approx(4 / 12)
            assert capacity_loss(model, 0.2).item() == pytest.approx(4 / 12 - 0.2)
            assert capacity_loss(model, 0.5).item() == 0.0


def test_the_capacity_loss_of_a_part_has_the_value_of_the_whole_and_its_own_gradient():
    model, ids = build_routed(), tokens()
    for mode in (model.eval(), model.train()):
        mode(ids, use_cache=False)
        weights = router_parameters(model)
        slopes = torch.autograd.grad(last(model, "gate").mean(), weights, retain_graph=True)
        assert all(slope.abs().max() > 0 for slope in slopes)
        for keep, expected in ((0.9, 0.4), (0.5001, 0.0001), (0.5, 0.0), (0.1, 0.0)):
            loss = capacity_loss(model, 0.5, keep=keep)
            assert loss.item() == pytest.approx(expected, abs=1e-6)
            found = torch.autograd.grad(loss, weights, retain_graph=True)
            for one, slope in zip(found, slopes):
                assert torch.equal(one, slope if keep > 0.5 else torch.zeros_like(slope))


def test_gates_can_be_fixed_for_some_layers_and_nested():
    model, ids = build_routed(), tokens()
    model(ids)
    free = decisions(model)
    with fix_gates(model, {3: False}):
        with fix_gates(model, {3: True, 2: False}):
            model(ids)
            assert decisions(model)[3].all() and not decisions(model)[2].any()
        model(ids)
        assert not decisions(model)[3].any() and torch.equal(decisions(model)[2], free[2])
    model(ids)
    assert all(torch.equal(gate, free[i]) for i, gate in decisions(model).items())
    with pytest.raises(ValueError, match=r"\[1\] are not routed"), fix_gates(model, {1: True}):
        pass
    with (
        pytest.raises(ValueError, match=r"\(3, 1\) gates for \(4, 1\)"),
        fix_gates(model, {3: torch.ones(3).bool()}),
    ):
        model(ids)


def test_routers_saved_and_loaded_decide_the_same(tmp_path):
    model, ids = build_routed(), tokens()
    expected = model(ids).logits
    save_routers(model, tmp_path / "routers.safetensors", note="kept")
    fresh = load_routers(build(), tmp_path / "routers.safetensors")
    assert torch.equal(fresh(ids).logits, expected)
    assert routers(fresh)[0].config == routers(model)[0].config
    assert (tmp_path / "routers.safetensors").stat().st_size < 4096
    assert [path.name for path in tmp_path.iterdir()] == ["routers.safetensors"]


def test_loaded_routers_replace_those_that_are_there(tmp_path):
    save_routers(build_routed(), tmp_path / "routers.safetensors")
    model = add_mindskip(build(), MindSkipConfig((1, 5)))
    assert len(routers(load_routers(model, tmp_path / "routers.safetensors"))) == len(ROUTED)
    assert torch.equal(model(tokens()).logits, build_routed()(tokens()).logits)


def test_a_wrapped_model_can_be_copied():
    model, ids = build_routed(), tokens()
    model(ids)
    copied = copy.deepcopy(model)
    voters = torch.zeros_like(ids).bool()
    voters[:, 0] = True
    assert torch.equal(copied(ids, voters=voters).logits, model(ids, voters=voters).logits)
    copied(ids)
    assert torch.equal(remove_mindskip(copied)(ids).logits, build()(ids).logits)
    assert 0 < keep_ratio(model) < 1


def test_a_model_can_be_copied_after_a_training_forward():
    model, ids = build_routed().train(), tokens()
    (model(ids, labels=ids, voters=ids > 0, use_cache=False).loss + capacity_loss(model, 0.1)).backward()
    copied = copy.deepcopy(model)
    for weight in router_parameters(model):
        weight.data.zero_()  # the copy has weights of its own
    assert torch.equal(copied.eval()(ids).logits, build_routed()(ids).logits)
    assert torch.equal(model.eval()(ids).logits, build()(ids).logits)
    (
        copied.train()(ids, labels=ids, voters=ids > 0, use_cache=False).loss + capacity_loss(copied, 0.1)
    ).backward()
    assert all(weight.grad.abs().max() > 0 for weight in router_parameters(copied))


@pytest.mark.parametrize("other", [{"hidden_size": 32}, {"num_hidden_layers": 8}, {"family": "qwen3"}])
def test_routers_of_another_model_are_refused(tmp_path, other):
    save_routers(build_routed(), tmp_path / "routers.safetensors")
    model = build(**other)
    with pytest.raises(ValueError, match="was tuned for"):
        load_routers(model, tmp_path / "routers.safetensors")
    assert not routers(model)


def test_files_that_hold_no_routers_are_refused(tmp_path):
    path = tmp_path / "routers.safetensors"
    path.write_bytes(b"\x00" * 5)
    with pytest.raises(ValueError, match="holds no MindSkip routers"):
        load_routers(build(), path)
    build().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no MindSkip routers"):
        load_routers(build(), tmp_path / "model" / "model.safetensors")


def test_remove_mindskip_gives_the_original_back(family):
    model, ids = build(family), tokens()
    expected, modules, names = model(ids).logits, list(model.modules()), list(model.state_dict())
    add_mindskip(model, MindSkipConfig(ROUTED))
    for weight in router_parameters(model):
        weight.data.normal_()
    model(ids)
    assert remove_mindskip(model) is model
    assert [id(m) for m in model.modules()] == [id(m) for m in modules] and list(model.state_dict()) == names
    assert torch.equal(model(ids).logits, expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_save_pretrained_writes_a_checkpoint_of_the_base_model(tmp_path, family):
    model, ids = build(family), tokens()
    expected = model(ids).logits
    add_mindskip(model, MindSkipConfig(ROUTED)).save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_attaching_leaves_the_random_state_alone():
    model = build()
    state = torch.get_rng_state()
    add_mindskip(model, MindSkipConfig(ROUTED))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": (0, 1)},
        {"layers": ()},
        {"layers": (2, 2)},
        {"layers": (-1,)},
        {"layers": (1.5,)},
        {"layers": (1,), "capacity": 1.5},
        {"layers": (1,), "capacity": -0.1},
        {"layers": (1,), "capacity": "half"},
        {"layers": (1,), "capacity": float("nan")},
        {"layers": (1,), "threshold": 2},
        {"layers": (1,), "granularity": "mlp"},
    ],
)
def test_bad_configurations_are_refused(arguments):
    with pytest.raises(ValueError):
        MindSkipConfig(**arguments)


def test_layers_that_cannot_be_routed_are_refused():
    with pytest.raises(ValueError, match="can be routed"):
        add_mindskip(build(), MindSkipConfig((LAYERS,)))
    with pytest.raises(ValueError, match="already"):
        add_mindskip(build_routed(), MindSkipConfig(ROUTED))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=64)
    )
    with pytest.raises(ValueError, match="can be routed"):
        add_mindskip(gpt2, MindSkipConfig((2,)))
    with pytest.raises(ValueError, match="no gate yet"):
        keep_ratio(add_mindskip(build(), MindSkipConfig(ROUTED)))
