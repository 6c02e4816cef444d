"""How much of the ideal saving is reached: all routed gates closed, against attention and its layer norm cut out.

    python tests/limit.py      # one thread, a few minutes

On a random Llama of width 512 and 8 layers. A share of 1 means that a closed gate costs nothing at all.
"""

import argparse
import copy
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate import Row, Watch, decode, dense, prefill, static, table  # noqa: E402
from mindskip import MindSkipConfig, add_mindskip, capacity_loss, router_parameters  # noqa: E402
from tune import show_progress  # noqa: E402


class WithoutAttention(torch.nn.Module):
    """A Llama decoder layer from which attention and its layer norm have been cut: the most that can be saved."""

    def __init__(self, layer):
        super().__init__()
        self.mlp, self.norm = layer.mlp, layer.post_attention_layernorm

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.mlp(self.norm(hidden_states))


def limit_model() -> tuple[torch.nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=8, vocab_size=2048)  # fmt: skip
    return LlamaForCausalLM(config).eval(), (3, 4, 5, 6)


def limit_rows(layers: tuple[int, ...]) -> list[Row]:
    @contextmanager
    def removed(model, batch):
        decoder = model.get_decoder()
        whole = decoder.layers
        decoder.layers = torch.nn.ModuleList(WithoutAttention(m) if i in layers else m for i, m in enumerate(whole))
        yield
        decoder.layers = whole

    return [dense(), static("closed", layers), Row("removed", removed)]


@torch.no_grad()
def operations_share() -> float:
    """(dense - closed) / (dense - removed), by operations dispatched in one decode step."""
    model, layers = limit_model()
    counts = []
    for row in limit_rows(layers):
        with row.using(model, 1):
            cache, token = prefill(model, torch.arange(16)[None])
            with Watch() as watch:
                decode(model, cache, token, 1)
        counts.append(watch.operations)
    return (counts[0] - counts[1]) / (counts[0] - counts[2])


def cpu_time(function, *args) -> tuple[float, object]:
    """CPU milliseconds of this thread in one call, and what it returns."""
    start = time.thread_time()
    result = function(*args)
    return 1e3 * (time.thread_time() - start), result


def tuning_step(model, batch: torch.Tensor, optimizer) -> None:
    (model(batch, labels=batch, use_cache=False).loss + capacity_loss(model, 0.5)).backward()
    optimizer.step()


def time_limit(repeats: int, progress, length: int = 512, new_tokens: int = 32) -> dict[str, dict]:
    """CPU time of one thread: shares of the ideal gain, and a tuning step's cost in dense forward passes.

    Three copies of one model take turns, in decoding at every token, so that a drift of the machine meets all.
    """
    torch.set_num_threads(1)
    model, layers = limit_model()
    model.requires_grad_(False)
    prompt, batch = torch.arange(length)[None], torch.arange(1024).reshape(4, 256)
    trained = add_mindskip(copy.deepcopy(model), MindSkipConfig(layers)).train()
    optimizer = torch.optim.AdamW(router_parameters(trained), lr=1e-3)
    times, ratios = {"prefill": [], "decode": []}, []
    with ExitStack() as stack:
        models = [copy.deepcopy(model) for _ in range(3)]
        for row, copied in zip(limit_rows(layers), models):
            stack.enter_context(row.using(copied, 1))
        for repeat in range(-1, repeats):
            with torch.no_grad():
                prefills, states = zip(*(cpu_time(prefill, one, prompt) for one in models))
                steps = [
                    [cpu_time(decode, one, *state, 1)[0] for one, state in zip(models, states)]
                    for _ in range(new_tokens)
                ]
                forward, _ = cpu_time(lambda: model(batch, labels=batch, use_cache=False))
            step, _ = cpu_time(tuning_step, trained, batch, optimizer)
            if repeat >= 0:
                times["prefill"].append(prefills)
                times["decode"].append([statistics.median(column) for column in zip(*steps)])
                ratios.append(step / forward)
            progress(repeat + 2, repeats + 1)
    results = {"operations": {"share": operations_share()}}
    for phase, rows in times.items():
        # A share is a ratio of differences of noisy times: that of the medians, and quartiles of single repeats.
        medians = [statistics.median(column) for column in zip(*rows)]
        low, _, high = statistics.quantiles([(full - ours) / (full - cut) for full, ours, cut in rows], n=4)
        share = (medians[0] - medians[1]) / (medians[0] - medians[2])
        results[phase] = {"share": share, "q1": low, "q3": high, "dense_closed_removed_ms": medians}
    low, middle, high = statistics.quantiles(ratios, n=4)
    results["tuning step"] = {"dense_forwards": middle, "q1": low, "q3": high}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25, help="of every figure, at least 2")
    results = time_limit(parser.parse_args().repeats, show_progress("limit"))
    print("Llama 512 x 8 layers, layers 3-6 routed and closed; CPU time of one thread, interleaved")
    lines = [["decode, operations", f"{results['operations']['share']:.3f}", ""]]
    for phase in ("prefill", "decode"):
        at = results[phase]
        lines.append([f"{phase}, CPU time", f"{at['share']:.3f}", f"[{at['q1']:.3f} {at['q3']:.3f}]"])
    at = results["tuning step"]
    lines.append(["tuning step, in dense forwards", f"{at['dense_forwards']:.2f}", f"[{at['q1']:.2f} {at['q3']:.2f}]"])
    print(table(["share of the ideal gain", "median", "quartiles"], lines))


if __name__ == "__main__":
    main()
