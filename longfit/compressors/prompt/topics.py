"""Topics of a text: spectral clusters of the similarity graph of its blocks."""

import torch
from torch import Tensor

MOST_TOPICS = 24


def topics(similarity: Tensor, most: int = MOST_TOPICS) -> list[int]:
    """The topic of each of N blocks with non-negative similarities [N, N].

    Eigenvectors of the normalised Laplacian, as many as the largest gap between the eigenvalues says (2 to `most`),
    clustered by k-means from the farthest points.

    Source: Ng, Jordan and Weiss 2001; von Luxburg 2007 (the eigengap).
    """
    n = similarity.shape[0]
    if n < 4:
        return [0] * n
    weights = similarity.double().clone()
    weights.fill_diagonal_(0.0)
    degrees = weights.sum(1).clamp(min=1e-9)
    scaled = weights / (degrees[:, None] * degrees[None]).sqrt()
    values, vectors = torch.linalg.eigh(torch.eye(n, dtype=torch.double) - scaled)
    most = min(most, n // 2)
    gaps = values[2 : most + 1] - values[1:most]
    k = 2 + int(gaps.argmax()) if gaps.numel() else 1
    rows = torch.nn.functional.normalize(vectors[:, :k], dim=1)
    return k_means(rows, k).tolist()


def k_means(rows: Tensor, k: int, steps: int = 50) -> Tensor:
    """The cluster [N] of each row, from centres that are as far apart as can be; the same each time."""
    centres = [rows[(rows - rows.mean(0)).norm(dim=1).argmax()]]
    while len(centres) < k:
        distance = torch.cdist(rows, torch.stack(centres)).min(1).values
        centres.append(rows[distance.argmax()])
    middle = torch.stack(centres)
    owner = torch.cdist(rows, middle).argmin(1)
    for _ in range(steps):
        middle = torch.stack([rows[owner == c].mean(0) if bool((owner == c).any()) else middle[c] for c in range(k)])
        moved = torch.cdist(rows, middle).argmin(1)
        if torch.equal(moved, owner):
            break
        owner = moved
    return owner
