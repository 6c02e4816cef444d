"""Tiny random models of several families; every test runs on a CPU without network."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mindskip import MindSkipConfig, add_mindskip, routers

LAYERS, VOCABULARY, WIDTH = 6, 64, 64
ROUTED = (2, 3, 4)
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8}),  # norms before and after attention
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8,
                                    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "olmo2": ("Olmo2Config", {}),  # norm after attention only
    "cohere": ("CohereConfig", {}),  # norm shared with the MLP
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),  # has routers of its own
}  # fmt: skip
MORE = {
    "qwen2": ("Qwen2Config", {}),
    "phi3": ("Phi3Config", {}),  # query, key and value in one matrix
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 32}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                                 "sliding_window": 8}),
    "llama4": ("Llama4TextConfig", {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4,
                                    "num_experts_per_tok": 1, "attention_chunk_size": 64}),  # get_decoder misses it
    "lfm2": ("Lfm2Config", {"layer_types": ["full_attention", "conv"] + ["full_attention"] * 4}),  # a hybrid KV cache
}  # fmt: skip


def build(family: str = "llama", **changes) -> torch.nn.Module:
    """A small random model in eval mode."""
    torch.manual_seed(0)
    name, extra = (FAMILIES | MORE)[family]
    config = getattr(transformers, name)(**{**SHAPE, **extra, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # larger weights: what a layer adds must show in the logits
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def build_routed(family: str = "llama", decided: bool = True, **changes) -> torch.nn.Module:
    """The same with routers; if `decided`, random ones, large enough to keep scores away from the threshold."""
    model = add_mindskip(build(family, **changes), MindSkipConfig(ROUTED))
    if decided:
        torch.manual_seed(1)
        for router in routers(model):
            router.weight.data.copy_(4.0 * torch.randn(WIDTH))
    return model


def tokens(rows: int = 4, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    return request.param


# ---- checkpoints and datasets on the disk, for what the scripts load ----
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML) -> transformers.PreTrainedTokenizerFast:
    """One token for each printable character; texts begin with BOS, as Llama's do."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=specials[4:], **names
    )
    fast.chat_template = chat_template
    return fast


def save_checkpoint(folder, family: str = "llama", **changes) -> str:
    """A small random model and its tokenizer in the real format."""
    build(family, vocab_size=128, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def need_adapters() -> None:
    """Skip a test that needs the extra `lora`: without PEFT, or with one that transformers refuses."""
    pytest.importorskip("peft", reason="the extra `lora`")
    from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"the extra `lora`: {error}")


def save_rows(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question_rows(count: int = 40) -> list[dict]:
    """Sums, to have something that is cheap, and of different lengths."""
    return [
        {"prompt": f"{i}+{i * i}=", "answer": str(i + i * i), "task": f"digits {len(str(i))}"}
        for i in range(count)
    ]
