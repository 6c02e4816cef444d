"""What has not been run yet, for want of a GPU: time at the shape of Llama-3-8B, and the scripts on CUDA.

    python tests/gpu.py                     # about an hour on one GPU of 80 GB; JSON goes to runs/gpu
    python tests/gpu.py --tiny              # the same commands at a tiny shape, on any machine, to see that they run

Weights are random and gates are fixed: times are real, texts are not. The paper reports 1.21x for prompts and answers
of its benchmarks on Llama-3-8B.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import evaluate  # noqa: E402
import tune  # noqa: E402

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 96, 6, 4, 2, 128),
}


def configuration(name: str) -> str:
    """A folder with the configuration of a shape, and the demo's tokenizer."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[name]
    folder = Path("runs/gpu", name)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=65536,
        rope_theta=500000.0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tune.DEMO).save_pretrained(folder)
    return str(folder)


def checkpoint(name: str, dtype: torch.dtype) -> str:
    """The same with random weights."""
    folder = configuration(name)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder), dtype=dtype)
    model.save_pretrained(folder)
    return folder


def what_if(shape: str, lengths: str, batches: str, *flags: str) -> dict:
    output = Path("runs/gpu", f"what-if {' '.join(flags)} {lengths} {batches}".replace("/", "_"))
    sizes = ["--prompt-length", lengths, "--batch-size", batches]
    evaluate.main(["--what-if", "--model", configuration(shape), "--output", str(output), *sizes, *flags])
    return json.loads((output / "what-if.json").read_text())["cost"]


def timed(main, *flags: str) -> dict:
    """Seconds, and the most GiB that were allocated, of one command."""
    start = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    main(list(flags))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"command": flags, "seconds": time.perf_counter() - start, "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="only see whether all of this runs")
    is_tiny = parser.parse_args().tiny
    big, middle, repeats = ("tiny", "tiny", "2") if is_tiny else ("8b", "1b", "5")
    lengths = ("16", "32") if is_tiny else ("512,2048,8192", "32768")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found = {"device": name, "torch": torch.__version__, "what_if": {}, "commands": []}
    for attention in ("sdpa", "eager"):
        flags = ("--attn-implementation", attention, "--repeats", repeats)
        found["what_if"][f"{attention}, one prompt"] = what_if(big, lengths[0], "1", *flags)
        found["what_if"][f"{attention}, batches"] = what_if(big, lengths[0].split(",")[0], "8,32", *flags)
    found["what_if"]["sdpa, long"] = what_if(
        big, lengths[1], "1", "--attn-implementation", "sdpa", "--repeats", repeats
    )
    steps = ("--steps", "5" if is_tiny else "1500", "--overwrite")
    found["commands"].append(timed(tune.main, "--name", "gpu-demo", *steps))
    cost = ("--repeats", "2", "--prompt-length", lengths[0])
    found["commands"].append(timed(evaluate.main, "--routers", "runs/gpu-demo", *(cost if is_tiny else ())))
    for shape, steps in ((middle, "20"), (big, "20")):
        model = ("--model", checkpoint(shape, torch.bfloat16), "--dtype", "bfloat16", "--max-samples", "64")
        for estimator in ("rloo", "straight-through"):
            run = ("--steps", steps, "--estimator", estimator, "--micro-batch-size", "1", "--overwrite")
            found["commands"].append(timed(tune.main, *model, *run, "--name", f"gpu-{shape}"))
        found["commands"].append(timed(evaluate.main, *model, *cost, "--routers", f"runs/gpu-{shape}"))
    evaluate.write_json(found, Path("runs/gpu/results.json"))
    print("the tests on this device: python -m pytest tests/test_cuda.py")


if __name__ == "__main__":
    main()
