"""SAU written out literally and slowly, as the published procedure states it.

All images take part in every step, clean predictions are recomputed in every step, nothing is
cached. The tests hold `defense/sau.py` to it, and `perf/literal.py`.
"""

import torch
from torch import nn


def js_terms(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """Mean of the two Kullback-Leibler terms to the mean; probabilities floored at 1e-8."""
    p = torch.softmax(logits, dim=1).clamp(min=1e-8)
    q = torch.softmax(ref_logits, dim=1).clamp(min=1e-8)
    mean = 0.5 * (p + q)
    to_p = (p * (torch.log(p) - torch.log(mean))).sum(dim=1)
    to_q = (q * (torch.log(q) - torch.log(mean))).sum(dim=1)
    return 0.5 * to_p + 0.5 * to_q


def projected(delta: torch.Tensor, bound: float, norm: str) -> torch.Tensor:
    result = delta.clone()
    for i in range(len(delta)):
        if norm == "L_inf":
            result[i] = torch.clamp(delta[i], -bound, bound)
        elif norm in ("L1", "L2"):
            length = torch.linalg.vector_norm(delta[i].flatten(), ord=int(norm[1]))
            if length > bound:
                result[i] = delta[i] * (bound / length)
    return result


def perturbation(
    model: nn.Module,
    reference: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    norm: str,
    start: str,
    bound: float,
    step: float,
    steps: int,
    beta_1: float,
    beta_2: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Section 4 of the specification, point by point."""
    model.eval()
    reference.eval()
    n = len(images)
    delta = {
        "zero": lambda: torch.zeros_like(images),
        "max": lambda: torch.ones_like(images) * bound,
        "min": lambda: -torch.ones_like(images) * bound,
        "random": lambda: torch.rand(images.shape, dtype=images.dtype, generator=generator),
    }[start]()
    delta = projected(delta, bound, norm)
    for _ in range(steps):
        clean = model(images).argmax(dim=1)
        ref_clean = reference(images).argmax(dim=1)
        delta = delta.detach().requires_grad_(True)
        z, z_ref = model(images + delta), reference(images + delta)
        adversarial_sum, js_sum, all_shared = torch.zeros(()), torch.zeros(()), True
        js = js_terms(z, z_ref)
        for i in range(n):
            fooled = bool(z[i].argmax() != clean[i])
            ref_fooled = bool(z_ref[i].argmax() != ref_clean[i])
            shared = fooled and ref_fooled and bool(z[i].argmax() == z_ref[i].argmax())
            if not fooled:
                adversarial_sum = adversarial_sum - torch.log_softmax(z[i], dim=0)[labels[i]]
            if not ref_fooled:
                adversarial_sum = adversarial_sum - torch.log_softmax(z_ref[i], dim=0)[labels[i]]
            if not shared:
                js_sum = js_sum + js[i]
                all_shared = False
        if all_shared:
            break
        loss = beta_1 * (-adversarial_sum / (2 * n)) + beta_2 * js_sum / n
        loss.backward()
        with torch.no_grad():
            delta = projected(delta - step * delta.grad.sign(), bound, norm)
    return delta.detach()


def losses(
    logits: torch.Tensor,
    adv_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ref_adv_logits: torch.Tensor,
    labels: torch.Tensor,
    lmd: tuple[float, float, float],
) -> dict[str, torch.Tensor]:
    """Section 5, points 2 to 4, one image at a time."""
    n = len(labels)
    clean, adversarial, shared = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for i in range(n):
        clean = clean - torch.log_softmax(logits[i], dim=0)[labels[i]] / n
        adversarial = adversarial - torch.log_softmax(adv_logits[i], dim=0)[labels[i]] / n
        t = int(ref_adv_logits[i].argmax())
        if t == int(labels[i]) or t == int(ref_logits[i].argmax()):
            continue
        probabilities = torch.softmax(adv_logits[i], dim=0)
        others = torch.stack([probabilities[k] for k in range(len(probabilities)) if k != t]).sum()
        by_others = torch.log(1e-6 + torch.clamp(others, max=0.999))
        by_label = torch.log(1 + 1e-6 - torch.clamp(probabilities[t], min=0.001))
        shared = shared - 0.5 * (by_others + by_label) / n
    total = lmd[0] * clean + lmd[1] * adversarial + lmd[2] * shared
    return {"clean": clean, "adversarial": adversarial, "shared": shared, "total": total}
