"""Views of a text: MIRROR (arXiv 2511.18159), and more than two of them."""

import numpy as np
import numpy.typing as npt

from megatron_mdm.objective.randomness import GRID_BITS


def view_uniforms(grid: npt.NDArray[np.int64], view: int, views: int) -> npt.NDArray[np.int64]:
    """The uniforms of one of several views of a row; two views are MIRROR (arXiv 2511.18159).

    Each view is exactly uniform. MIRROR uses u and 1 - u. The two masks are then as negatively
    correlated as two masks can be: -min(p/(1-p), (1-p)/p) at each position. With K > 2 views, view
    j uses frac(u + j/K).

    Args:
        grid: uniforms of the row as grid integers [L].
        view: number of the view, j in 0..K-1.
        views: number of views, K.

    Returns:
        Grid integers [L].
    """
    last = np.int64(2**GRID_BITS - 1)
    turn = np.int64((view << GRID_BITS) // views)
    turned: npt.NDArray[np.int64] = last - grid if (view, views) == (1, 2) else grid + turn & last
    return turned
