"""Gradients as vectors, and random projections that leave variances unbiased."""

from collections.abc import Sequence

import torch

MOST_WHOLE = 8192  # by default, longer gradients are projected to this many numbers


class Sketch:
    """A seeded random projection of gradients that leaves squared norms unbiased.

    It is a count sketch: every coordinate is added, with a random sign, to one of d sums. Squared
    norms, and therefore traces of covariances, are unbiased. The relative error of one sketch is at
    most sqrt(2/d).

    Args:
        parameters: the parameters that the gradients belong to.
        size: d; None: no projection, every coordinate is kept.
        seed: seed of the projection.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], size: int | None, seed: int = 0):
        self.parameters = parameters
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self._places: list[tuple[torch.Tensor, torch.Tensor]] = []
        for p in parameters if size is not None else []:
            place = torch.randint(size or 0, (p.numel(),), generator=generator, dtype=torch.int32)
            sign = torch.randint(2, (p.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
            self._places.append((place.to(p.device), sign.to(p.device)))

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """The (projected) gradient of a scalar, float32 [d], on the CPU."""
        return self.project(gradients(loss, self.parameters))

    def gradient_and_norm(
        self, loss: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """Like `gradient`, and also the norm of the gradient with respect to `hidden`.

        The loss must depend on `hidden`.
        """
        *found, at_hidden = gradients(loss, [*self.parameters, hidden])
        return self.project(found), float(torch.linalg.vector_norm(at_hidden.float()))

    def project(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Projects a vector that is given in parts; float32 [d], on the CPU.

        Args:
            parts: one tensor for each parameter, in the shape of the parameter.
        """
        return self._sums(parts).cpu()

    def _sums(self, parts: list[torch.Tensor]) -> torch.Tensor:
        if self.size is None:
            return torch.cat([g.flatten().float() for g in parts]) if parts else torch.zeros(0)
        result = torch.zeros(self.size, device=parts[0].device if parts else None)
        for g, (place, sign) in zip(parts, self._places, strict=True):
            result.index_add_(0, place, g.flatten().float() * sign)
        return result


def gradients(loss: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a scalar; zeros for inputs that it does not depend on."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
