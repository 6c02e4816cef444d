"""Routed models in the hands of other libraries: adapters of PEFT, hooks of accelerate, distributed checkpoints."""

import copy

import pytest
import torch
from conftest import ROUTED, WIDTH, build, build_routed, tokens
from safetensors.torch import load_file
from test_mindskip import CLOSED, MIXED, decisions

from mindskip import (
    MindSkipConfig,
    add_mindskip,
    capacity_loss,
    fix_gates,
    last,
    remove_mindskip,
    router_parameters,
    routers,
)

# ---- PEFT ----


def with_lora(model):
    """Adapters that change something: PEFT's own start at zero."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(2)
    return peft.get_peft_model(model, config)


def routed_as(model, reference) -> torch.nn.Module:
    """The model with the routers of a reference."""
    add_mindskip(model, MindSkipConfig(ROUTED))
    for mine, wanted in zip(router_parameters(model), router_parameters(reference), strict=True):
        mine.data.copy_(wanted.data)
    return model


ORDERS = {
    "routers first": lambda: with_lora(build_routed()),
    "adapters first": lambda: routed_as(with_lora(build()), build_routed()),
    "adapters first, routers inside": lambda: wrap_inside(with_lora(build())),
}


def wrap_inside(adapted):
    routed_as(adapted.get_base_model(), build_routed())
    return adapted


@pytest.mark.parametrize("order", list(ORDERS))
def test_all_adapters_of_a_routed_model_are_saved_and_loaded(order, tmp_path):
    model, ids = ORDERS[order](), tokens()
    expected = model(ids).logits
    assert 0 < last(model.get_base_model(), "gate").mean() < 1
    assert (expected - build_routed()(ids).logits).abs().max() > 0.1  # adapters change something
    with_lora(build()).save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "routed")
    dense, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("dense", "routed"))
    assert set(saved) == set(dense) and len(saved) == 2 * 2 * 6  # A and B, of two matrices, in six layers
    from peft import PeftModel

    again = PeftModel.from_pretrained(build_routed(), tmp_path / "routed")
    assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize("order", ["routers first", "adapters first"])
def test_adapters_of_a_dense_model_fit_the_routed_one(order, tmp_path):
    dense, ids = with_lora(build()), tokens()
    dense.save_pretrained(tmp_path)
    from peft import PeftModel

    if order == "routers first":
        model = PeftModel.from_pretrained(build_routed(), tmp_path)
    else:
        model = routed_as(PeftModel.from_pretrained(build(), tmp_path), build_routed())
    with fix_gates(model, dict.fromkeys(ROUTED, True)):
        assert torch.equal(model(ids).logits, dense(ids).logits)
    with fix_gates(model, MIXED):
        mixed = model(ids).logits
    with fix_gates(ORDERS["routers first"](), MIXED) as reference:
        assert torch.equal(mixed, reference(ids).logits)


@pytest.mark.parametrize("order", list(ORDERS))
def test_labels_given_to_an_adapted_model_keep_answers_from_voting(order):
    model, ids = ORDERS[order](), tokens()
    labels = ids.clone()
    labels[:, :12] = -100
    model(ids[:, :12])
    expected = decisions(model)
    model(ids)
    assert any(
        not torch.equal(gate, expected[i]) for i, gate in decisions(model).items()
    )  # else nothing is shown
    for mode in (model.eval(), model.train()):
        mode(input_ids=ids, labels=labels, use_cache=False)
        assert all(torch.equal(gate, expected[i]) for i, gate in decisions(model).items())
    generated = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
    )
    assert generated.shape == (4, 23)


def test_merged_adapters_leave_a_routed_model():
    model, ids = ORDERS["routers first"](), tokens()
    expected, gates = model(ids).logits, last(model, "gate")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)  # W + BA, added up once
    assert torch.equal(last(merged, "gate"), gates) and len(routers(merged)) == len(ROUTED)


# ---- accelerate ----


try:
    import accelerate
    from accelerate import hooks
except ImportError:
    accelerate = None
needs_accelerate = pytest.mark.skipif(accelerate is None, reason="needs the extra `accelerate`")
ORDER_OF_HOOKS = ["hooks first", "routers first", "hooks first, then removed"]


def add_hooks(model) -> None:
    """What a device map puts on modules: hooks that replace `forward` of an instance."""
    for layer in model.model.layers:
        for module in (layer, layer.self_attn, layer.self_attn.q_proj, layer.input_layernorm, layer.mlp):
            hooks.add_hook_to_module(
                module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
            )
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu"))


def dispatch(model) -> None:
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def hooked(put, order: str) -> torch.nn.Module:
    model = build()
    if order != "routers first":
        put(model)
    if order == "hooks first, then removed":  # accelerate leaves an attribute `forward` behind
        hooks.remove_hook_from_module(model, recurse=True)
    routed_as(model, build_routed())
    if order == "routers first":
        put(model)
    return model


@needs_accelerate
@pytest.mark.parametrize("put", [add_hooks, dispatch])
@pytest.mark.parametrize("order", ORDER_OF_HOOKS)
def test_closed_gates_are_skipped_under_the_hooks_of_a_device_map(put, order):
    model, reference, ids = hooked(put, order), build_routed(), tokens()
    called = []
    for i, layer in enumerate(model.model.layers):
        for module in (
            layer.self_attn.q_proj,
            layer.input_layernorm,
        ):  # the norm's weight is used inside `forward`
            forward = module.forward
            module.forward = lambda *args, i=i, f=forward, **kwargs: (
                called.append((i, len(args[0]))) or f(*args, **kwargs)
            )
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert torch.equal(last(model, "gate"), last(reference, "gate")) and 0 < last(model, "gate").mean() < 1
    called.clear()
    with fix_gates(model, CLOSED), fix_gates(reference, CLOSED):
        assert torch.equal(model(ids).logits, reference(ids).logits)
    assert called == [(i, 4) for i in (0, 1, 5) for _ in range(2)]  # norm and attention, of the others
    with fix_gates(model, MIXED), fix_gates(reference, MIXED):
        assert torch.equal(model(ids).logits, reference(ids).logits)
        step = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(model.generate(ids, **step), reference.generate(ids, **step))


@needs_accelerate
@pytest.mark.parametrize("put", [add_hooks, dispatch])
@pytest.mark.parametrize("order", ORDER_OF_HOOKS)
def test_a_hooked_model_can_be_unwrapped_in_any_order(put, order):
    model, ids, dense = hooked(put, order), tokens(), build()
    expected = dense(ids).logits
    assert torch.equal(remove_mindskip(model)(ids).logits, expected)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(ids).logits, expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]

    # The other way round: first the hooks are taken off, then the routers.
    model = hooked(put, order)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(ids).logits, build_routed()(ids).logits)
    assert torch.equal(remove_mindskip(model)(ids).logits, expected)


@needs_accelerate
@pytest.mark.parametrize("order", ORDER_OF_HOOKS)
def test_checkpointing_recomputes_under_hooks_with_the_same_gradients(order):
    ids, found = tokens(), []
    for model, checkpointing in ((build_routed(), False), (hooked(add_hooks, order), True)):
        model.requires_grad_(False).train()
        for weight in router_parameters(model):
            weight.requires_grad_(True)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
        calls = []
        for i, layer in enumerate(model.model.layers):
            layer.mlp.gate_proj.register_forward_pre_hook(lambda *_, i=i, seen=calls: seen.append(i))
        labels = ids.clone()
        labels[:, :12] = -100
        loss = model(ids, labels=labels, use_cache=False).loss + capacity_loss(model, 0.1)
        loss.backward()
        assert [calls.count(i) for i in range(6)] == ([1, 1, 2, 2, 2, 2] if checkpointing else [1] * 6)
        found.append((decisions(model), [weight.grad for weight in router_parameters(model)]))
    (gates, plain), (again, checkpointed) = found
    assert all(torch.equal(gates[i], again[i]) for i in gates)
    for one, two in zip(plain, checkpointed, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(two, one)


# ---- torch ----


def test_a_distributed_checkpoint_of_a_routed_model_can_be_loaded(tmp_path):
    import torch.distributed.checkpoint as dcp

    model, ids = build_routed(), tokens()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    other = routed_as(build(), model)
    for parameter in other.parameters():
        parameter.data.zero_()
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, model(ids).logits)
    dense = build()  # what a dense model reads of it
    state = {name: torch.zeros_like(tensor) for name, tensor in dense.state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    dense.load_state_dict(state)
    assert torch.equal(dense(ids).logits, build()(ids).logits)


def test_a_state_dict_of_the_parallel_kind_has_the_same_names():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, ids = build_routed(), tokens()
    state = get_model_state_dict(model)  # as FSDP and DDP would ask for it
    assert list(state) == list(model.state_dict()) and state[
        "model.layers.3.self_attn.router.weight"
    ].shape == (WIDTH,)
    other = routed_as(build(), copy.deepcopy(model))
    for parameter in other.parameters():
        parameter.data.zero_()
    set_model_state_dict(other, state)
    assert torch.equal(other(ids).logits, model(ids).logits)
