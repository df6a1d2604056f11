"""Random small models of every family and random jobs on them, for the property tests.

Every function takes ``choose``, which picks one of several values: ``random.Random(seed).choice``,
or hypothesis' ``draw`` of ``sampled_from``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vramplan.catalogue import model_from_config
from vramplan.job import Job
from vramplan.model import Model
from vramplan.optimizers import OPTIMIZERS

Choose = Callable[[Sequence[Any]], Any]

LLAMA_LIKE = (
    "gemma", "gemma2", "gemma3_text", "gpt_oss", "llama", "mistral", "mixtral", "olmo2", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm", "starcoder2",
)  # fmt: skip
DROPOUTS = (0.0, 0.0, 0.1, 0.125)


def config(choose: Choose, family: str) -> dict[str, Any]:
    """A small config.json of a family, with the switches that published models use."""
    heads, head_dim = choose((2, 4, 8)), choose((16, 32, 64))
    hidden = heads * head_dim
    own = _llama_like if family in LLAMA_LIKE else _OTHERS[family]
    names = _NAMES.get(family, ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    return {
        "model_type": family,
        names[0]: hidden,
        names[1]: heads,
        names[2]: choose((1, 2, 3, 4, 6)),
        "vocab_size": choose((72, 1000, 5003, 20000)),
        "tie_word_embeddings": choose((False, True)),
        "pad_token_id": 0,
        **own(choose, family, heads, head_dim),
    }


_NAMES = {
    "gptj": ("n_embd", "n_head", "n_layer"),
    "gpt2": ("n_embd", "n_head", "n_layer"),
    "bloom": ("hidden_size", "n_head", "n_layer"),
}


def _llama_like(choose: Choose, family: str, heads: int, head_dim: int) -> dict[str, Any]:
    key_heads = choose([count for count in (1, 2, 4, 8) if heads % count == 0])
    made: dict[str, Any] = {
        "num_key_value_heads": key_heads,
        "intermediate_size": choose((96, 200, 688)),
        "max_position_embeddings": 1024,
        "attention_dropout": choose(DROPOUTS),
    }
    own = _LLAMA_SWITCHES.get(family)
    return made | (own(choose, head_dim) if own else {})


def _window(choose: Choose) -> dict[str, Any]:
    return {"sliding_window": choose((32, 64, 200))}


def _experts(choose: Choose, key: str) -> dict[str, Any]:
    return {key: choose((2, 4, 8)), "num_experts_per_tok": choose((1, 2))}


def _gemma(choose: Choose, head_dim: int) -> dict[str, Any]:
    return {"head_dim": choose((head_dim, 32))}


def _gemma2(choose: Choose, head_dim: int) -> dict[str, Any]:
    return {
        **_gemma(choose, head_dim), **_window(choose),
        "attn_logit_softcapping": choose((50.0, None)),
        "final_logit_softcapping": choose((30.0, None)),
    }  # fmt: skip


_LLAMA_SWITCHES: dict[str, Callable[[Choose, int], dict[str, Any]]] = {
    "llama": lambda choose, _dim: {
        "attention_bias": choose((False, True)), "mlp_bias": choose((False, True)),
        "hidden_act": choose(("silu", "gelu", "relu")),
    },
    "mistral": lambda choose, _dim: {"sliding_window": choose((None, 32, 64, 200))},
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": lambda choose, dim: {
        **_gemma(choose, dim), **_window(choose), "sliding_window_pattern": choose((2, 3)),
    },
    "gpt_oss": lambda choose, dim: {
        **_experts(choose, "num_local_experts"), **_window(choose), "head_dim": dim,
        "layer_types": None,
    },
    "mixtral": lambda choose, _dim: {
        **_experts(choose, "num_local_experts"), "sliding_window": choose((None, 64)),
    },
    "phi": lambda choose, _dim: {
        "partial_rotary_factor": choose((0.5, 1.0)), "qk_layernorm": choose((False, True)),
        "resid_pdrop": choose(DROPOUTS), "embd_pdrop": choose(DROPOUTS),
    },
    "phi3": lambda choose, _dim: {
        "partial_rotary_factor": choose((1.0, 0.5)), "resid_pdrop": choose(DROPOUTS),
        "sliding_window": choose((None, 64)),
    },
    "qwen2": lambda choose, _dim: {
        "use_sliding_window": choose((False, True)), "sliding_window": 64, "max_window_layers": 0,
    },
    "qwen2_moe": lambda choose, _dim: {
        **_experts(choose, "num_experts"), "moe_intermediate_size": choose((64, 200)),
        "shared_expert_intermediate_size": choose((128, 200)),
        "decoder_sparse_step": choose((1, 2)), "norm_topk_prob": choose((False, True)),
    },
    "qwen3": lambda choose, dim: {
        "head_dim": choose((dim, 48)), "attention_bias": choose((False, True)),
    },
    "qwen3_moe": lambda choose, dim: {
        **_experts(choose, "num_experts"), "moe_intermediate_size": choose((64, 200)),
        "head_dim": dim, "mlp_only_layers": choose(([], [0], [1])),
        "norm_topk_prob": choose((False, True)),
    },
    "stablelm": lambda choose, _dim: {
        "use_qkv_bias": choose((False, True)), "qk_layernorm": choose((False, True)),
        "use_parallel_residual": choose((False, True)), "hidden_dropout": choose(DROPOUTS),
        "partial_rotary_factor": choose((0.25, 1.0)),
    },
    "starcoder2": lambda choose, _dim: {
        "sliding_window": choose((None, 64)), "use_bias": choose((True, False)),
        "residual_dropout": choose(DROPOUTS), "embedding_dropout": choose(DROPOUTS),
    },
}  # fmt: skip


def _gptj(choose: Choose, _family: str, _heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "rotary_dim": choose((head_dim, head_dim // 2)), "n_inner": choose((None, 200)),
        "n_positions": 1024, **{k: choose(DROPOUTS) for k in ("attn_pdrop", "resid_pdrop")},
        "embd_pdrop": choose(DROPOUTS),
    }  # fmt: skip


def _gpt2(choose: Choose, _family: str, _heads: int, _dim: int) -> dict[str, Any]:
    return {
        "n_inner": choose((None, 200)), "n_positions": 1024,
        "reorder_and_upcast_attn": choose((False, False, True)),
        **{k: choose(DROPOUTS) for k in ("attn_pdrop", "resid_pdrop", "embd_pdrop")},
    }  # fmt: skip


def _gpt_neox(choose: Choose, _family: str, _heads: int, _dim: int) -> dict[str, Any]:
    return {
        "intermediate_size": choose((200, 688)), "rotary_pct": choose((0.25, 1.0)),
        "use_parallel_residual": choose((True, False)), "attention_bias": choose((True, False)),
        "hidden_dropout": choose(DROPOUTS), "attention_dropout": choose(DROPOUTS),
    }  # fmt: skip


def _bloom(choose: Choose, _family: str, _heads: int, _dim: int) -> dict[str, Any]:
    return {
        "apply_residual_connection_post_layernorm": choose((False, True)),
        "hidden_dropout": choose(DROPOUTS), "attention_dropout": choose(DROPOUTS),
    }  # fmt: skip


def _falcon(choose: Choose, _family: str, heads: int, _dim: int) -> dict[str, Any]:
    grouped = choose((False, True))
    own: dict[str, Any] = (
        {"new_decoder_architecture": True, "num_kv_heads": choose((1, 2, heads))}
        if grouped
        else {"multi_query": choose((True, False)), "parallel_attn": choose((True, False))}
    )
    return own | {
        "bias": choose((False, True)), "alibi": choose((False, False, True)),
        "hidden_dropout": choose(DROPOUTS), "attention_dropout": choose(DROPOUTS),
    }  # fmt: skip


def _opt(choose: Choose, _family: str, _heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "ffn_dim": choose((200, 688)), "do_layer_norm_before": choose((True, False)),
        "dropout": choose(DROPOUTS), "attention_dropout": choose(DROPOUTS),
        "enable_bias": choose((True, False)), "max_position_embeddings": 1024,
        **choose(({}, {"word_embed_proj_dim": 2 * head_dim})),
    }  # fmt: skip


_OTHERS: dict[str, Callable[[Choose, str, int, int], dict[str, Any]]] = {
    "gptj": _gptj, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "bloom": _bloom, "falcon": _falcon,
    "opt": _opt,
}  # fmt: skip


def job(choose: Choose, names: Sequence[str] = (), savable: Sequence[str] = ()) -> Job:
    """A job that Trainer would run.

    Args:
        choose: Picks one of several values.
        names: Linear layers of the model, of which some may be targets.
        savable: Modules that may be saved whole.
    """
    method = choose(("full", "lora", "qlora"))
    adapters: dict[str, Any] = {}
    if method != "full":
        adapters = {
            "lora_r": choose((1, 4, 8, 24)), "lora_dropout": choose(DROPOUTS),
            "target_modules": choose(("all-linear", *[(name,) for name in names])),
            "modules_to_save": choose(((), (), *[(name,) for name in savable])),
        }  # fmt: skip
    if method == "qlora":
        adapters |= {
            "quant_type": choose(("nf4", "nf4", "fp4", "int8")),
            "double_quant": choose((True, False)), "prepare_kbit": choose((True, True, False)),
        }  # fmt: skip
    dtype = choose(("bf16", "bf16", "fp16", "fp32"))
    mixed = choose(("bf16", "bf16", "fp16", "no"))
    if method == "full" and dtype == "fp16" and mixed == "fp16":
        dtype = "fp32"  # the gradient scaler refuses 16-bit gradients
    return Job(
        method=method,
        batch_size=choose((1, 2, 3)),
        seq_len=choose((1, 7, 40, 64, 100, 128, 250)),
        gradient_accumulation_steps=choose((1, 1, 2, 3)),
        gradient_checkpointing=choose((True, False)),
        optim=choose((None, *sorted(OPTIMIZERS))),
        attn_implementation=choose((None, "eager")),
        dtype=dtype,
        mixed_precision=mixed,
        **adapters,
    )


def sample(choose: Choose, family: str) -> tuple[Model, Job]:
    """A small model of a family and a job on it."""
    values = config(choose, family)
    model = model_from_config(values, family)
    arch = model.architecture
    savable = [spec.name.rsplit(".", 1)[-1] for spec in (arch.head, arch.embedding)]
    return model, job(choose, sorted(set(arch.linear_names())), savable)
