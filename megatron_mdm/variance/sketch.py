"""Gradients as vectors, and random projections of them that keep variances in the mean."""

from collections.abc import Sequence

import torch

MOST_WHOLE = 8192  # numbers of a gradient that is kept, by default; longer ones are projected


class Sketch:
    """A seeded random projection of gradients that keeps squared lengths in the mean.

    A count sketch: every coordinate goes, with a random sign, into one of d sums. Squared lengths,
    and so traces, are unbiased, with a relative error of at most sqrt(2/d) for one sketch.

    Args:
        parameters: what the gradients belong to.
        size: d; None keeps every coordinate.
        seed: of the projection.
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
        """The same, and the norm of the gradient at `hidden`, of which the loss is a function."""
        *found, at_hidden = gradients(loss, [*self.parameters, hidden])
        return self.project(found), float(torch.linalg.vector_norm(at_hidden.float()))

    def project(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The (projected) vector, float32 [d], on the CPU.

        Args:
            parts: one tensor for each of the parameters, of its shape.
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
