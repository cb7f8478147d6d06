"SUMix in plain loops over samples, from the formulas: what the tests of this folder compare with"
import math

import torch

from sumix_nb.mixers.mixed import Mixed


def softmax(values):
    "Softmax of a list of numbers or 0-d tensors, one by one"
    top = max(float(torch.as_tensor(value).detach()) for value in values)
    parts = [torch.exp(torch.as_tensor(value, dtype=torch.float64) - top) for value in values]
    return [part / sum(parts) for part in parts]


def norm(values): return sum(value * value for value in values) ** 0.5


def nll(logits, label): return -torch.log(softmax(list(logits))[int(label)])


def distance(z_mixed, z, variant):
    "Semantic distance of two encodings"
    if variant == "poster": return norm(softmax([a - b for a, b in zip(z_mixed, z, strict=True)]))
    return norm([a ** 0.5 - b ** 0.5 for a, b in zip(softmax(list(z_mixed)), softmax(list(z)), strict=True)])


def scalar_oracle(logits_mixed, head_mixed, head, z_mixed, z, mixture, variant, xi):
    "(loss, lambda~, mixed cross-entropy, regulariser) of the scalar variants, in loops over samples"
    target_a, target_b, lam, partner = mixture.target_a, mixture.target_b, mixture.lam, mixture.partner
    ratios, mixed_ce, regulariser, n = [], 0.0, 0.0, len(logits_mixed)
    for i in range(n):
        j = int(partner[i])
        d_a, d_b = (float(distance(z_mixed[i].detach(), z[k].detach(), variant)) for k in (i, j))
        share, prior = None, float(lam[i])
        if prior in (0.0, 1.0): share = prior
        else: share = prior * math.exp(-d_a) / (prior * math.exp(-d_a) + (1 - prior) * math.exp(-d_b))
        ratios.append(share)
        ce_a, ce_b = (nll(logits_mixed[i], target[i]) for target in (target_a, target_b))
        mixed_ce = mixed_ce + share * ce_a + (1 - share) * ce_b
        u_mixed, u_a, u_b = (norm(softmax(list(row))) for row in (head_mixed[i], head[i], head[j]))
        su_a, su_b = (logits_mixed[i] * torch.exp(-(u_mixed + u + d)) for u, d in ((u_a, d_a), (u_b, d_b)))
        regulariser = regulariser + prior * nll(su_a, target_a[i]) + (1 - prior) * nll(su_b, target_b[i])
    return (mixed_ce + xi * regulariser) / n, torch.tensor(ratios, dtype=torch.float64), mixed_ce / n, regulariser / n


def repeated_loss(loss_func, logits, target_a, target_b, eighths):
    "`loss_func` on a batch that holds row i `eighths[i]` times with its first label, and up to 8 with its second"
    rows, labels = [], []
    for i, count in enumerate(eighths):
        rows += [logits[i]] * 8
        labels += [target_a[i]] * count + [target_b[i]] * (8 - count)
    return loss_func(torch.stack(rows), torch.stack(labels))


def released_vector(z_mixed, z, other, n):
    "`n` times the unit vector of softmax(p~ - p), where p has 0 in place of the other source's label"
    p_mixed, p = softmax(list(z_mixed)), softmax(list(z))
    values = softmax([a - (0.0 if k == int(other) else b) for k, (a, b) in enumerate(zip(p_mixed, p, strict=True))])
    return [n * value / norm(values) for value in values]


def draw(n, k, dtype=torch.float64, seed=0, scale=2.0, requires_grad=False):
    "Random inputs of `sumix_loss`: mixed and clean logits, mixed and clean head outputs, and the mixture"
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(n, k, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(4)]
    target, partner = torch.randint(k, (n,), generator=generator), torch.randperm(n, generator=generator)
    lam = torch.rand(n, generator=generator, dtype=torch.float64).float()
    mixed = Mixed(torch.zeros(n, 1, 1, 1), target, target[partner], lam, partner)
    return [row.requires_grad_(requires_grad) for row in rows], mixed
