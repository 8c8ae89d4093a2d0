"""Attention over a prefix tree, handed to transformers through its attention and mask interfaces.

A model that was given `TREE_ATTENTION` as its attention reads one row of tokens, of which each sees those before
it in its own sequence and no others. No mask over the whole row is ever built: on CUDA FlexAttention gets the
tree's one rule; everywhere else scaled-dot-product attention runs block by block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from dpo_cli.modeling.tree import Block, PrefixTree, blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TREE_ATTENTION = "dpo_prefix_tree"
"""The attention's name in transformers."""

_WITHOUT_EFFECT = {
    "sliding_window", "position_ids", "position_embeddings", "cache_position", "use_cache", "past_key_values",
    "is_causal",
}  # fmt: skip
"""What models hand to their attention and a tree has said already: the window comes with the mask."""

_IN_WORDS = {"s_aux": "sinks", "position_bias": "a position bias", "is_causal": "both directions"}
"""What else they may ask for, by its name in transformers."""


class CannotPack(Exception):
    """A model asks for something that attention over a tree does not do."""


@dataclass(frozen=True)
class TokenTree:
    """Which token of a row sees which.

    Attributes:
        depths: `[T]`, each token's position in its sequences.
        ends: `[T]`, the place behind the last token that sees it.
        blocks: The row in pieces without branches.
    """

    depths: Tensor
    ends: Tensor
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, tree: PrefixTree) -> TokenTree:
        """Take over what attention needs of a tree."""
        return cls(torch.from_numpy(tree.depths), torch.from_numpy(tree.ends), blocks(tree))

    def to(self, device: torch.device) -> TokenTree:
        """Return the tree with its tensors on a device."""
        return TokenTree(self.depths.to(device), self.ends.to(device), self.blocks)


@dataclass(frozen=True)
class TreeMask:
    """The mask of all layers of one kind: the tree, and how far they look back.

    Attributes:
        blocks: The row in pieces.
        window: The most tokens that a token sees, itself included, or None.
    """

    blocks: tuple[Block, ...]
    window: int | None
    _masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict, repr=False)

    def seen(self, block: Block) -> list[int]:
        """Return the numbers of the blocks before one of which it sees anything."""
        if self.window is None:
            return list(block.path)
        horizon = block.depth - self.window + 1
        return [i for i in block.path if self.blocks[i].depth + len(self.blocks[i]) > horizon]

    def of(self, num_queries: int, num_keys: int, like: Tensor) -> Tensor | None:
        """Return the mask to add for queries that are the last of their keys, or None where nothing is hidden."""
        shape = num_queries, num_keys
        if shape not in self._masks:
            window = self.window or num_keys
            distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
            hidden = (distance < 0) | (distance >= window)
            mask = torch.zeros(shape).masked_fill_(hidden, float("-inf")).to(like)
            self._masks[shape] = mask if num_queries > 1 or num_keys > window else None
        return self._masks[shape]


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
        raise CannotPack("it takes no attention from outside")
    model.set_attn_implementation(TREE_ATTENTION)


def tree_mask(**arguments: Any) -> Any:
    """Answer a model that asks for its mask: a block mask for FlexAttention on CUDA, else a `TreeMask`.

    Raises:
        CannotPack: No tree is being read, or each token is to see others than those before it, up to a window.
    """
    tree, window = _tree.get(), arguments.get("local_size")
    if tree is None:
        raise CannotPack("no prefix tree is being read")
    if arguments.get("use_vmap") or "allow_is_bidirectional_skip" in arguments:
        raise CannotPack("its attention mask has rules of its own")
    # Chunks come under the same name as windows, and differ from them only in sequences longer than a chunk.
    if window is not None and window != getattr(arguments["config"], "sliding_window", None):
        raise CannotPack("its layers look back in chunks")
    return _flex_mask(tree, window) if tree.ends.is_cuda else TreeMask(tree.blocks, window)


def tree_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
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
    mask, scaling, softcap = attention_mask, options.pop("scaling", None), options.pop("softcap", None)
    _refuse_others(options)
    if not isinstance(mask, TreeMask):
        from transformers.integrations.flex_attention import flex_attention_forward

        # Under autocast rotated queries and keys are float32 again, and FlexAttention wants one type.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return flex_attention_forward(module, query, key, value, mask, scaling=scaling, softcap=softcap)[0], None
    sizes = [len(block) for block in mask.blocks]
    # Split once: each piece's gradient then has its own size, where slices would fill the whole row with zeros.
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    attended = []
    for place, block in enumerate(mask.blocks):
        seen = [*mask.seen(block), place]
        k, v = (torch.cat([pieces[i] for i in seen], dim=2) if seen[1:] else pieces[place] for pieces in (keys, values))
        attended.append(_attend(queries[place], k, v, mask, scaling, softcap).transpose(1, 2))
    # Turned before they are joined: the row is then contiguous, which some architectures rely on.
    return torch.cat(attended, dim=1), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attend from one block's tokens to the keys that end with their own."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        added, causal = mask.of(query.shape[2], key.shape[2], query), False
        if added is not None and query.shape[2] == key.shape[2] and mask.window is None:
            added, causal = None, True
        return scaled_dot_product_attention(
            query, key, value, attn_mask=added, is_causal=causal, scale=scaling, enable_gqa=groups > 1
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if (added := mask.of(query.shape[2], key.shape[2], query)) is not None:
        scores = scores + added
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def flex_rule(tree: TokenTree, window: int | None) -> Any:
    """Return the tree's rule as FlexAttention asks for it: whether the token at `q` sees the one at `k`."""
    depths, ends = tree.depths, tree.ends

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < ends[k])
        return seen if window is None else seen & (depths[q] - depths[k] < window)

    return sees


def _flex_mask(tree: TokenTree, window: int | None) -> Any:
    """Return the block mask of FlexAttention, which is compiled so that it is never whole either."""
    from torch.nn.attention.flex_attention import create_block_mask

    size, device = len(tree.ends), tree.ends.device
    return create_block_mask(flex_rule(tree, window), None, None, size, size, device=device, _compile=True)


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
