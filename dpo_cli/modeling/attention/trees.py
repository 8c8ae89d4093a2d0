"""Attention over a prefix tree, handed to transformers through its attention and mask interfaces.

A model that was given `TREE_ATTENTION` as its attention reads one row of tokens, of which each sees those before
it in its own sequence and no others. No mask over the whole row is ever built: each kernel has the tree in its own way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from transformers import AttentionInterface, AttentionMaskInterface

from dpo_cli.modeling.attention.kernels import PIECES, Kernel
from dpo_cli.modeling.sending import sent
from dpo_cli.modeling.tree import PrefixTree, Stretch, padded, stretches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TREE_ATTENTION = "dpo_prefix_tree"
"""The attention's name in transformers."""

_WITHOUT_EFFECT = {
    "sliding_window", "position_ids", "position_embeddings", "cache_position", "use_cache", "past_key_values",
    "is_causal", "output_router_logits",
}  # fmt: skip
"""What models hand to their attention and a tree has said already, or that is not for it: the window comes with the
mask, and router logits are of the experts."""

_IN_WORDS = {"s_aux": "sinks", "position_bias": "a position bias", "is_causal": "both directions"}
"""What else they may ask for, by its name in transformers."""


class CannotPack(Exception):
    """A model asks for something that attention over a tree does not do, or a kernel does not do it here."""


class Mask(Protocol):
    """The mask of all layers of one kind, as a kernel has it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
        """Attend under the mask; arguments and result are those of `tree_attention`."""
        ...


@dataclass(frozen=True)
class TokenTree:
    """Which token of a row sees which.

    Attributes:
        depths: `[T]`, each token's position in its sequences; 0 where there is padding.
        grown: The tree on the CPU, its padding included.
        stretches: The row in pieces without branches; the last is its padding, where there is any.
        kernel: What computes attention over it.
        indices: What the kernel asked to have on the device for each window of the model's layers.
    """

    depths: Tensor
    grown: PrefixTree
    stretches: tuple[Stretch, ...]
    kernel: Kernel
    indices: Mapping[int | None, tuple[Tensor, ...]]

    @classmethod
    def of(cls, tree: PrefixTree, kernel: Kernel = PIECES, windows: Sequence[int | None] = (None,)) -> TokenTree:
        """Compute what a kernel needs of a tree, for layers with these windows."""
        size = len(tree.tokens)
        row, pieces = padded(tree, kernel.row_tokens(size)), stretches(tree)
        if len(row.tokens) > size:
            # What padding sees does not matter to whoever goes by pieces.
            pieces = (*pieces, Stretch(size, len(row.tokens), 0, ()))
        found = cls(torch.from_numpy(row.depths), row, pieces, kernel, {})
        return replace(found, indices={window: found._computed(window) for window in windows})

    def to(self, device: torch.device) -> TokenTree:
        """Return the tree with its tensors on a device."""
        return sent(self, device)

    def mask(self, window: int | None) -> Mask:
        """Return the mask of the layers with a window."""
        if detect_fake_mode() is not None:
            # Where memory is counted on tensors without content, pieces keep as much as a kernel does.
            return PIECES.mask(self.stretches, window, [])
        indices = self.indices.get(window)
        if indices is None:
            indices = tuple(tensor.to(self.depths.device) for tensor in self._computed(window))
        return self.kernel.mask(self.stretches, window, indices)

    def _computed(self, window: int | None) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, self.kernel.indices(self.grown, self.stretches, window)))


_tree: ContextVar[TokenTree | None] = ContextVar("tree", default=None)


@contextlib.contextmanager
def reading(tree: TokenTree | None) -> Iterator[None]:
    """Let models whose attention is `TREE_ATTENTION` read the next row as this tree."""
    token = _tree.set(tree)
    try:
        yield
    finally:
        _tree.reset(token)


def attend_to_trees(model: PreTrainedModel) -> None:
    """Give a model attention over trees.

    Raises:
        CannotPack: Its architecture takes no attention from outside.
    """
    if not model._supports_attention_backend:
        raise CannotPack("its attention cannot be replaced")
    model.set_attn_implementation(TREE_ATTENTION)


def windows_of(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Return the windows that layers of a model are likely to ask for; None: without one."""
    settings = config.get_text_config()
    window, kinds = getattr(settings, "sliding_window", None), getattr(settings, "layer_types", None)
    if window is None or kinds is None:
        return (window,)
    asked = {window if kind == "sliding_attention" else None for kind in kinds}
    return tuple(sorted(asked, key=lambda found: found or 0))


def tree_mask(**arguments: Any) -> Mask:
    """Answer a model that asks for its mask.

    Raises:
        CannotPack: No tree is being read, or each token is to see others than those before it, up to a window.
    """
    tree, window = _tree.get(), arguments.get("local_size")
    if tree is None:
        raise CannotPack("no prefix tree is being read")
    if arguments.get("use_vmap") or "allow_is_bidirectional_skip" in arguments:
        raise CannotPack("its attention mask has special rules")
    # Chunks come under the same name as windows, and differ from them only in sequences longer than a chunk.
    if window is not None and window != getattr(arguments["config"], "sliding_window", None):
        raise CannotPack("its layers attend in chunks")
    return tree.mask(window)


def tree_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, **options: Any
) -> tuple[Tensor, None]:
    """Attend over a tree.

    Args:
        module: The layer that asks.
        query: `[1, heads, T, d]`.
        key: `[1, key-value heads, T, d]`; fewer heads than the query has are shared by neighbouring ones.
        value: `[1, key-value heads, T, d']`.
        attention_mask: What `tree_mask` answered; some architectures hand it over by this name.
        options: `scaling` of the products, `softcap` on them, and what else the architecture hands over.

    Returns:
        `[1, T, heads, d']`, and no weights.

    Raises:
        CannotPack: The architecture asks for something else as well: sinks, a bias, attention both ways.
    """
    scaling, softcap = options.pop("scaling", None), options.pop("softcap", None)
    _refuse_others(options)
    return attention_mask.attend(query, key, value, scaling, softcap), None


def _refuse_others(options: dict[str, Any]) -> None:
    """Refuse what a model asks of its attention and is not known to be without effect here."""
    asked = {name for name, value in options.items() if isinstance(value, Tensor) or value}
    refused = asked - _WITHOUT_EFFECT
    if options.get("is_causal", True) is False:
        refused.add("is_causal")
    if refused:
        raise CannotPack(f"its attention has {', '.join(sorted(_IN_WORDS.get(name, name) for name in refused))}")


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, tree_mask)
