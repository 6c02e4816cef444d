"""On a GPU, where there is one: what the other tests show on a CPU, in half precision, and that nothing waits."""

import pytest
import torch
from conftest import ROUTED, build, build_routed, tokens
from test_granularity import build_gated
from test_mindskip import MIXED
from test_tune import examples, settings

import tune
from mindskip import (
    GRANULARITIES,
    MindSkipConfig,
    add_mindskip,
    fix_gates,
    keep_ratio,
    last,
    router_parameters,
    routers,
)

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.15,
    torch.float16: 0.03,
}  # of the largest logit; other kernels


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE[found.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_open_gates_reproduce_the_base_model_bit_for_bit_and_training_agrees(granularity, dtype):
    model, ids = build().to(DEVICE, dtype), tokens().to(DEVICE)
    expected = model(ids).logits
    add_mindskip(model, MindSkipConfig(ROUTED, granularity))
    assert torch.equal(model(ids).logits, expected)
    model = build_gated(granularity).to(DEVICE, dtype)
    found, gates = model(ids).logits, last(model, "gate")
    assert 0 < keep_ratio(model) < 1 and all(
        weight.dtype == torch.float32 for weight in router_parameters(model)
    )
    masked = model.train()(ids, use_cache=False).logits
    if torch.equal(last(model, "gate"), gates):  # in half precision a score at the threshold may round across
        close(found, masked)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_rows_of_a_mixed_batch_equal_each_row_alone(dtype):
    model, ids = build_routed().to(DEVICE, dtype), tokens().to(DEVICE)
    gates = {i: gate.to(DEVICE) for i, gate in MIXED.items()}
    with fix_gates(model, gates):
        output = model(ids)
    step = model(ids[:, :1], past_key_values=output.past_key_values).logits
    for row in range(4):
        with fix_gates(model, {i: gate[row : row + 1] for i, gate in gates.items()}):
            alone = model(ids[row : row + 1])
        close(output.logits[row], alone.logits[0])
        close(step[row], model(ids[row : row + 1, :1], past_key_values=alone.past_key_values).logits[0])


@torch.no_grad()
def test_decoding_rows_that_agree_never_waits_for_the_device():
    model, ids = build_routed().to(DEVICE), tokens().to(DEVICE)
    with fix_gates(model, {2: True, 3: False, 4: True}):
        cache = model(ids).past_key_values
    token = ids[:, :1].clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            model(token, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("estimator", ["rloo", "straight-through"])
def test_tuning_changes_routers_only(estimator):
    model = add_mindskip(build().to(DEVICE, torch.bfloat16).requires_grad_(False), MindSkipConfig(ROUTED))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tune.tune(model, examples(), settings(steps=3, batch_size=8, estimator=estimator))
    tune.calibrate(model, examples(), 0.5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith("router.weight")
    assert routers(model)[0].weight.device.type == DEVICE
