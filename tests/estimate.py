"""What tuning Llama-3-8B takes: bytes alive in one training step, and FLOPs, on the real shape with fake tensors.

    python tests/estimate.py      # no weights, no GPU; half a minute

Fake tensors have a shape and no data: each operation of the step is dispatched, and its outputs are counted until they
are freed (evaluate.Watch). A GPU adds its context and what its allocator and kernels hold; expect 1 or 2 GiB more.
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

from evaluate import Watch, forward_flops, table  # noqa: E402
from mindskip import MindSkipConfig, add_mindskip, capacity_loss  # noqa: E402
from tune import checkpoint_activations, default_layers  # noqa: E402

LLAMA = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)  # fmt: skip
SHAPES = [(4, 256), (1, 2048), (4, 2048)]  # (B, T) of a micro-batch


@contextmanager
def without_data():
    """What asks for values, of which fake tensors have none, is left out: where the norm sits, packed sequences."""
    packed = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda *arguments: None)
    with FakeTensorMode(), mock.patch("mindskip._move_norm", lambda *arguments: None), packed:
        yield


def step_costs(model, rows: int, length: int) -> tuple[int, int]:
    """Forward and backward of one micro-batch: most bytes alive beyond the weights, and FLOPs."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, Watch() as watch:
        logits = model(ids, use_cache=False).logits
        loss = model.loss_function(logits, ids, model.config.vocab_size)
        (loss + capacity_loss(model, -1.0)).backward()
    return watch.peak_bytes, counter.get_total_flops()


def main() -> None:
    with without_data():
        model = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.bfloat16).requires_grad_(False)
        weights, layers = sum(p.nbytes for p in model.parameters()), default_layers(model)
        add_mindskip(model, MindSkipConfig(layers)).train()
        plain = [step_costs(model, *shape) for shape in SHAPES]
        checkpoint_activations(model)
        saving = [step_costs(model, *shape) for shape in SHAPES]
        lines = []
        for (rows, length), pair in zip(SHAPES, zip(plain, saving)):
            cells = [(f"{(weights + peak) / 2**30:.1f}", f"{flops / 1e12:.1f}") for peak, flops in pair]
            lines.append([f"{rows} x {length}", *cells[0], *cells[1]])
        forward = forward_flops(model, 2048, 2048, {}, logits=2048)
        flops = {keep: forward_flops(model, 2048, 2048, dict.fromkeys(layers, keep)) for keep in (1.0, 0.5, 0.0)}
    print(f"layers {layers} routed | weights in bfloat16 {weights / 2**30:.1f} GiB")
    print(table(["micro-batch", "GiB", "TFLOP", "GiB, checkpointing", "TFLOP, checkpointing"], lines))
    print(f"forward pass of 2,048 tokens, every logit: {forward / 1e12:.1f} TFLOP")
    print(f"prefill of 2,048 tokens: {flops[1.0] / 1e12:.1f} TFLOP; x{flops[1.0] / flops[0.5]:.2f} fewer with half of"
          f" the gates open, x{flops[1.0] / flops[0.0]:.2f} with none")  # fmt: skip


if __name__ == "__main__":
    main()
