"""Gemma: norms times (1 + weight) in fp32, a scaled embedding, heads wider than hidden / heads.

Source: transformers 5.17.0 ``models/gemma/modeling_gemma.py``.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.families import llama
from vramplan.families.common import Env, Family, pre_norm_block, rotary_prepare
from vramplan.formats import FP32
from vramplan.layers import Embedding, Layer, Norm
from vramplan.model import Architecture, Dims
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """GemmaConfig."""
    refuse_bidirectional(c)
    dims = llama.read(
        c.with_defaults(
            vocab_size=256000,
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
            hidden_act="gelu_pytorch_tanh",
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    )
    return replace(dims, mlp_bias=False)


def refuse_bidirectional(c: ConfigReader) -> None:
    """Embedding models made from these families mask otherwise.

    Raises:
        ConfigError: If the config asks for it.
    """
    if c.flag("use_bidirectional_attention", default=False):
        raise c.fail("use_bidirectional_attention", "is true; only causal models are planned")


def architecture(d: Dims) -> Architecture:
    """GemmaForCausalLM's modules."""
    return with_scaled_embedding(llama.architecture(d))


def with_scaled_embedding(arch: Architecture) -> Architecture:
    """The embedding of Gemma*TextScaledWordEmbedding, which keeps its factor in a buffer."""
    return replace(arch, embedding=arch.embedding._replace(buffers=(2,)))


def embed(t: Tape, table: Embedding, env: Env) -> Tensor:
    """GemmaTextScaledWordEmbedding.forward: ``super().forward(ids) * embed_scale.to(dtype)``."""
    weight = table.weight
    # the buffer has the dtype that the model was loaded in
    scale = ops.to(t, Tensor(None, 1, env.job.weight_dtype), weight.dtype)
    return ops.mul(t, ops.embedding(t, weight, env.tokens, table.spec.width), scale)


def rms_norm(t: Tape, norm: Norm, x: Tensor, env: Env) -> Tensor:
    """GemmaRMSNorm.forward: all in fp32, cast at the very end.

    ``output * (1.0 + self.weight.float())``
    """
    outer, t.owner = t.owner, norm.owner
    out = _normalise(t, ops.to(t, x, FP32), x.numel // norm.spec.size)
    out = ops.mul(t, out, ops.add_scalar(t, ops.to(t, norm.weight, FP32)))
    out = ops.to(t, out, x.dtype)
    t.owner = outer
    return out


def _normalise(t: Tape, x: Tensor, groups: int) -> Tensor:
    """GemmaRMSNorm._norm: ``x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)``."""
    return ops.mul(t, x, ops.rsqrt(t, ops.add_scalar(t, ops.mean(t, ops.pow_scalar(t, x), groups))))


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """GemmaDecoderLayer.forward."""
    return pre_norm_block(t, m, x, env, norm=rms_norm, attention=llama.attention, mlp=llama.mlp)


FAMILY = Family(
    model_type="gemma",
    read=read,
    architecture=architecture,
    block=block,
    norm=rms_norm,
    prepare=rotary_prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/gemma/modeling_gemma.py",
    embed=embed,
)
