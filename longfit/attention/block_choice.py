"""Which earlier keys a block of queries should attend to: estimates from a part of the attention map."""

import torch
from torch import Tensor

from longfit.attention.partial import repeat


def vertical_and_slash_scores(queries: Tensor, keys: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of the last queries, summed over columns and over diagonals of the map (MInference, algorithm 2).

    Args:
        queries: [B, H, R, D], the last R of S slots.
        keys: [B, G, S, D].
        scaling: factor of the dot products.

    Returns:
        Sums [B, H, S] by slot, and [B, H, S] by distance from query to key, in fp32.
    """
    B, H, R, D = queries.shape
    G, S = keys.shape[1:3]
    logits = torch.matmul(queries.reshape(B, G, H // G * R, D), keys.mT).float().mul_(scaling).view(B, H, R, S)
    places = torch.arange(S, device=keys.device)
    hidden = places[None] > places[S - R :, None]
    weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
    # With R zeros before it, row r read from its column r on has the same distance in every column as the rows above:
    # reading the flat map with rows one longer does that for all rows at once.
    padded = torch.nn.functional.pad(weights, (R, 0)).flatten(2)
    shifted = torch.nn.functional.pad(padded, (0, R)).view(B, H, R, R + S + 1)
    by_distance = shifted.sum(2)[..., 1 : S + 1].flip(-1)
    return weights.sum(2), by_distance


def top_with_forced(scores: Tensor, count: int, forced: int) -> Tensor:
    """Bool like `scores` [..., S]: the highest `count`, among them the first `forced` in any case."""
    count = min(count, scores.shape[-1])
    scores = scores.clone()
    scores[..., : min(forced, count)] = torch.inf
    chosen = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def crossed_blocks(distances: Tensor, block: int) -> Tensor:
    """How many blocks back the diagonals at the chosen `distances` [B, H, S] (bool) run.

    A diagonal crosses up to two blocks of keys for every block of queries, the same number of blocks back for all of
    them. Returns bool [B, H, S // block + 2] by blocks back.
    """
    S = distances.shape[-1]
    places = torch.arange(S, device=distances.device)
    back = distances.new_zeros(*distances.shape[:2], S // block + 2, dtype=torch.int32)
    for crossed in (places // block, -(-places // block)):
        back.index_add_(-1, crossed, distances.int())
    return back > 0


def mean_scores(queries: Tensor, keys: Tensor, block: int, counts: Tensor) -> Tensor:
    """Products of mean query and mean key of each pair of blocks (MInference, algorithm 3), [B, H, M, N] in fp32.

    Args:
        queries: [B, H, M * block, D], zeros where there is no query.
        keys: [B, G, N * block, D].
        block: tokens of a block.
        counts: [M] queries in each block.
    """
    asking = queries.unflatten(2, (-1, block)).float().sum(3) / counts.view(-1, 1)
    means = keys.unflatten(2, (-1, block)).float().mean(3)
    return torch.matmul(asking, repeat(means, queries.shape[1] // keys.shape[1]).mT)


def antidiagonal_scores(
    queries: Tensor, keys: Tensor, block: int, stride: int, scaling: float, before: Tensor
) -> Tensor:
    """Sums of attention along antidiagonals `stride` apart of each pair of blocks (XAttention, algorithm 1).

    In a cell of `stride` x `stride` the antidiagonal's sum of products is one product of the queries laid end to end
    with the keys laid end to end in reverse order. The softmax runs over the cells of earlier blocks.

    Args:
        queries: [B, H, M * block, D], zeros where there is no query; keys: [B, G, N * block, D].
        block: tokens of a block, a multiple of `stride`.
        scaling: factor of the dot products.
        before: bool [M, N], which blocks are earlier.

    Returns:
        [B, H, M, N] in fp32.
    """
    H, G, cells = queries.shape[1], keys.shape[1], block // stride
    asking = queries.unflatten(2, (-1, stride)).flatten(3)
    given = repeat(keys.unflatten(2, (-1, stride)).flip(3).flatten(3), H // G)
    logits = torch.matmul(asking, given.mT).float().mul_(scaling / stride)
    hidden = ~before.repeat_interleave(cells, 0).repeat_interleave(cells, 1)
    weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1).nan_to_num_(0.0)
    return weights.unflatten(3, (-1, cells)).sum(4).unflatten(2, (-1, cells)).sum(3)
