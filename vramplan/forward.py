"""The forward of a causal language model on the tape: from token ids to loss and logits.

Training and evaluation run the same block programs. Training checkpoints its layers where the job
says so; evaluation (``model.eval()`` under ``torch.no_grad()``) never does, drops nothing out and
keeps nothing, so that a tensor goes when the last line that names it is through.

Source: transformers 5.17.0 ``modeling_utils.py``, ``loss/loss_utils.py`` (``ForCausalLMLoss``);
accelerate 1.15.0 ``utils/operations.py`` (``convert_outputs_to_fp32``); torch 2.11.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.families import Family
from vramplan.families.common import Env
from vramplan.formats import FP32, INT64
from vramplan.layers import Built, Layer
from vramplan.tape import Leaf, Tape, Tensor
from vramplan.timeline import Kind, Phase


class Forward:
    """Walks the forward of one batch.

    Args:
        t: The tape.
        family: The model's block programs.
        built: Its modules on the tape.
        env: Shapes and attention of the batch.
        training: Whether it is training's forward; evaluation's books everything to its own phase.

    Attributes:
        marks: Positions on the tape before the layers, after each run of them, and before the loss.
        leaf: The embedding's output where checkpointing asks for its gradient.
    """

    def __init__(
        self, t: Tape, family: Family, built: Built, env: Env, *, training: bool = True
    ) -> None:
        self.tape = t
        self.family = family
        self.built = built
        self.runs = built.runs
        self.env = env
        self.training = training
        self.checkpointing = training and env.job.gradient_checkpointing
        self.marks: list[int] = []
        self.leaf: Leaf | None = None

    def batch(self) -> list[Tensor]:
        """input_ids, attention_mask and labels, as the data loader moves them to the device."""
        t = self.tape
        t.owner = "batch"
        return [t.new(self.env.tokens, INT64, Kind.BATCH) for _ in range(3)]

    def run(self, *, whole: bool = True) -> tuple[Tensor, Tensor]:
        """The model's forward and what accelerate wraps around it.

        Args:
            whole: Whether to walk the decoder; otherwise only what has a vocabulary dimension.

        Returns:
            The loss and the logits as accelerate hands them on, in fp32 under mixed precision.
        """
        t = self.tape
        with t.autocasting():
            loss, logits = self._causal_lm(whole)
        if self.env.job.autocast_dtype is not None:
            with t.no_autocast():
                t.kind = Kind.LOGITS
                logits = ops.to(t, logits, FP32)
        t.kind = Kind.ACTIVATIONS
        return loss, logits

    def _causal_lm(self, whole: bool) -> tuple[Tensor, Tensor]:
        """...ForCausalLM.forward."""
        t = self.tape
        hidden = self._decoder() if whole else self._hidden()
        self.marks.append(t.position)
        t.kind = Kind.LOGITS
        logits = self.family.head(t, self.built.head, hidden, self.env)
        if self.training:
            t.phase = Phase.LOSS
        t.owner = "loss"
        return self._loss(logits), logits

    def _decoder(self) -> Tensor:
        """...Model.forward: embedding, position tables, layers, final norm."""
        t, env, built = self.tape, self.env, self.built
        spec = built.embedding.spec
        name = spec.name.rsplit(".", 1)[0]
        t.owner = name
        position_ids = t.new(env.length, INT64, Kind.BATCH) if self.family.positions else None
        t.owner = spec.name
        embeds = self._require_grad(self.family.embed(t, built.embedding, env))
        t.owner = name
        hidden, held = self.family.enter(t, built.outside, embeds, env)
        t.owner = name
        self.family.prepare(t, embeds, env)
        del embeds
        self.marks = [t.position]
        for layers, run in zip(built.layers, self.runs, strict=True):
            with t.repeated(run.repeats):
                for layer in layers:
                    hidden = self._layer(layer, hidden)
                t.keep_output(hidden)
            self.marks.append(t.position)
        if built.final_norm is not None:
            hidden = self.family.norm(t, built.final_norm, hidden, env)
        hidden = self.family.leave(t, built.outside, hidden, env)
        env.kept = None
        del position_ids, held  # the model's forward holds them to its end
        if not self.training:
            env.keep(())
        elif self.checkpointing:
            env.keep(env.dims.kinds)
        else:  # nobody will run a block again: the graph alone holds tables, and no masks
            env.keep(self._folded_kinds(), masks=False)
        return hidden

    def _hidden(self) -> Tensor:
        """The decoder's result alone."""
        spec = self.built.embedding.spec
        return self.tape.new(self.env.tokens * spec.width, self.built.embedding.weight.dtype)

    def _folded_kinds(self) -> set[str]:
        """Kinds of which no layer is written out before the folded ones.

        The first layer of such a kind is the last to let go of its tables. Which repetition does
        cannot be written in a folded section, so they are held until all have been walked back.
        """
        seen: set[str] = set()
        folded: set[str] = set()
        for run in self.runs:
            if run.repeats > 1:
                folded.update(kind for kind in run.kinds if kind not in seen)
            seen.update(run.kinds)
        return folded

    def _require_grad(self, embeds: Tensor) -> Tensor:
        """enable_input_require_grads: checkpointing makes a frozen embedding's output a leaf.

        Its gradient is computed and kept with it until the graph goes.

        Source: transformers 5.17.0 ``modeling_utils.py`` (``gradient_checkpointing_enable``).
        """
        if not self.checkpointing or embeds.node is not None:
            return embeds
        assert embeds.storage is not None
        self.leaf = Leaf(embeds.storage, embeds.numel, embeds.dtype, True, self.tape.owner, 1)
        return self.leaf

    def _layer(self, layer: Layer, hidden: Tensor) -> Tensor:
        t, env, block = self.tape, self.env, self.family.block

        def run() -> Tensor:
            t.owner = layer.name
            env.use(layer.kind)
            return block(t, layer, hidden, env)

        return t.checkpoint(run) if self.checkpointing else run()

    def _loss(self, logits: Tensor) -> Tensor:
        """ForCausalLMLoss: fp32 logits, log_softmax, nll_loss."""
        t = self.tape
        upcast = ops.to(t, logits, FP32)
        labels = t.new(self.env.tokens + self.env.batch, INT64, Kind.BATCH)
        shifted = t.new(self.env.tokens, INT64, Kind.BATCH)
        del labels
        return ops.cross_entropy(t, upcast, shifted)
