"""What tuning Llama-3-8B takes: bytes alive in one training step, and FLOPs, on the real shape with fake tensors.

    python tests/estimate.py      # no weights, no GPU; half a minute

Fake tensors have a shape and no data: each operation of the step is dispatched, and its outputs are counted until
they are freed (evaluate.Watch). A GPU adds its context and what its allocator and kernels hold; expect 1 or 2 GiB
more. Gates have no value here, so all are open: an upper bound for the drawn step, which skips what is closed.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mindskip  # noqa: E402
import tune  # noqa: E402
from evaluate import Watch, forward_flops, table  # noqa: E402

LLAMA = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)
SHAPES = [(4, 256), (1, 2048), (4, 2048)]  # (prompts, T) of a micro-batch


@contextmanager
def without_data():
    """What asks for values, of which fake tensors have none, is left out: packed sequences, rows without voters."""
    packed = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda *arguments: None)
    everybody = mock.patch(
        "mindskip.Call.votes", lambda call, x: torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    )
    with FakeTensorMode(), packed, everybody:
        yield


def drawn_step(model, prompts: int, length: int) -> None:
    """Forward passes of the draws of each prompt, every gate open."""
    ids = torch.zeros(prompts * tune.DRAWS, length, dtype=torch.long)
    model.loss_function(model(ids, use_cache=False).logits, ids, model.config.vocab_size)


def straight_through_step(model, prompts: int, length: int) -> None:
    """Forward and backward."""
    ids = torch.zeros(prompts, length, dtype=torch.long)
    loss = model.loss_function(model(ids, use_cache=False).logits, ids, model.config.vocab_size)
    (loss + mindskip.capacity_loss(model, 0.0)).backward()


def costs(step, model) -> list[tuple[int, int]]:
    """Of every shape: most bytes alive beyond the weights, and FLOPs."""
    found = []
    for shape in SHAPES:
        with FlopCounterMode(display=False) as counter, Watch() as watch:
            step(model, *shape)
        found.append((watch.peak_bytes, counter.get_total_flops()))
    return found


def main() -> None:
    with without_data():
        model = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.bfloat16).requires_grad_(False)
        weights, layers = sum(p.nbytes for p in model.parameters()), tune.default_layers(model)
        steps = {"drawn": costs(drawn_step, model)}
        mindskip.add_mindskip(model, mindskip.MindSkipConfig(layers)).train()
        steps["straight-through"] = costs(straight_through_step, model)
        model.activation_checkpointing_enable({"use_reentrant": False})  # as tune.main does
        model.disable_input_require_grads()
        steps["with --gradient-checkpointing"] = costs(straight_through_step, model)
        rows = {}
        for k, (prompts, length) in enumerate(SHAPES):
            for name, found in steps.items():
                peak, flops = found[k]
                rows[f"{prompts} x {length}, {name}"] = {
                    "gib": (weights + peak) / 2**30,
                    "flops": flops / 1e12,
                }
        forward = forward_flops(model, 2048, 2048, {}, logits=2048)
        flops = {
            keep: forward_flops(model, 2048, 2048, dict.fromkeys(layers, keep)) for keep in (1.0, 0.5, 0.0)
        }
    print(f"layers {layers} routed | weights in bfloat16 {weights / 2**30:.1f} GiB | {tune.DRAWS} draws")
    print(table("micro-batch", rows, {"GiB": "{gib:.1f}", "TFLOP": "{flops:.1f}"}))
    print(f"forward pass of 2,048 tokens, every logit: {forward / 1e12:.1f} TFLOP")
    fewer = f"x{flops[1.0] / flops[0.5]:.2f} fewer with half of the gates open, x{flops[1.0] / flops[0.0]:.2f} with none"
    print(f"prefill of 2,048 tokens: {flops[1.0] / 1e12:.1f} TFLOP; {fewer}")


if __name__ == "__main__":
    main()
