"""Files of fitted rate densities: versioned JSON that is read back bit for bit."""

import json
from pathlib import Path
from typing import Any

from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.fit import PpotsFit
from megatron_mdm.objective.ppots.limits import TABLE_SIZE
from megatron_mdm.objective.ppots.moments import RateMoments
from megatron_mdm.objective.samplers import PiecewiseSampler

FORMAT, VERSION = "megatron-mdm rate density", 1


def sampler_text(fit: PpotsFit) -> str:
    """The JSON text of a fit, which `load_sampler` reads from a file."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "target": fit.target,
        "family": fit.family,
        "parameters": fit.parameters,
        "kl": fit.kl,
        "kls": fit.kls,
        "lam": fit.uniform_share,
        "eps": fit.eps,
        "moments": fit.moments.vector().tolist(),
        "errors": fit.errors,
        "edges": fit.table.edges.tolist(),
        "density": fit.table.values.tolist(),
    }
    # Python writes a float with the fewest decimals that give back the same bits.
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def load_sampler(path: str | Path) -> PpotsFit:
    """Reads a file with the text of `sampler_text`, bit for bit; `.sampler()` gives the density.

    Raises:
        UserError: the file does not exist, is damaged, has another version or is not a density.
    """
    again = "make it anew with tools/fit_ppots.py"
    try:
        content: Any = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"cannot read the rate density {path} ({error.strerror}): give --mdm-ppots-file a file "
            "of tools/fit_ppots.py"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a rate density (not JSON): {again}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a rate density ('format' is not '{FORMAT}'): {again}")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise UserError(f"{path} has version {version}, this program reads {VERSION}: {again}")
    try:
        if content["target"] not in ("loss", "gradient"):
            raise ValueError(f"'target' is {content['target']!r}")
        if len(content["edges"]) > TABLE_SIZE:
            raise ValueError(f"it has more than {TABLE_SIZE} edges")
        uniform_share, eps = float(content["lam"]), float(content["eps"])
        if not 0.0 < uniform_share <= 1.0:
            raise ValueError(f"'lam', the share of the uniform, is {uniform_share}")
        if not 0.0 < eps < 1.0:
            raise ValueError(f"'eps', the least masked fraction, is {eps}")
        moments = RateMoments.from_vector(content["moments"])
        return PpotsFit(
            target=content["target"],
            family=str(content["family"]),
            parameters={str(k): float(v) for k, v in content["parameters"].items()},
            kl=float(content["kl"]),
            kls={str(k): float(v) for k, v in content["kls"].items()},
            uniform_share=uniform_share,
            eps=eps,
            moments=moments,
            table=PiecewiseSampler(content["edges"], content["density"]),
            errors=_errors(content.get("errors"), moments.num_bins),
        )
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: {again}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} does not hold a density on (0, 1]: {error}; {again}") from error


def _errors(values: Any, num_bins: int) -> tuple[float, ...] | None:
    """Standard errors from a file; None for files of earlier versions of this program."""
    if values is None:
        return None
    errors = tuple(float(value) for value in values)
    if len(errors) != num_bins or not all(0.0 <= error < float("inf") for error in errors):
        raise ValueError("'errors' are not one number for each bin, finite and not negative")
    return errors
