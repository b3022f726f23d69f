"""Files of fits: they are read back bit for bit, and a damaged file is named in the error."""

import json
import os

import numpy as np
import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.files import write_text
from megatron_mdm.objective.ppots.fit import fit
from megatron_mdm.objective.ppots.fit_file import load_sampler, sampler_text
from megatron_mdm.objective.ppots.state import TABLE_SIZE
from tests.objective.ppots.measurements import epr_moment, moments_of, power_moment


def save_sampler(path, result):
    write_text(str(path), sampler_text(result))


@pytest.fixture
def saved(tmp_path):
    result = fit(moments_of(power_moment), target="gradient")
    path = tmp_path / "rates.json"
    save_sampler(path, result)
    return path, result


@pytest.mark.parametrize("family", ["epr", "power", "piecewise"])
def test_files_are_read_back_bit_for_bit(tmp_path, family):
    path = tmp_path / "rates.json"
    result = fit(moments_of(epr_moment), family=family, uniform_share=0.2, eps=0.002)
    save_sampler(path, result)
    loaded = load_sampler(str(path))
    assert loaded == result
    assert loaded.sampler().digest() == result.sampler().digest()
    assert os.listdir(tmp_path) == ["rates.json"]


def test_errors_are_kept_and_files_without_them_are_read(tmp_path):
    path = tmp_path / "rates.json"
    errors = np.linspace(0.1, 0.2, 30)
    result = fit(moments_of(power_moment), family="piecewise", errors=errors)
    save_sampler(path, result)
    assert load_sampler(path).errors == tuple(errors) and load_sampler(path) == result
    content = json.loads(path.read_text())
    del content["errors"]
    path.write_text(json.dumps(content))
    assert load_sampler(path).errors is None
    errors[3] = np.nan
    assert fit(moments_of(power_moment), family="piecewise", errors=errors).errors is None


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    path, result = saved
    before = path.read_text()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="cannot write .*rates.json: No space left"):
        save_sampler(path, result)
    assert path.read_text() == before
    assert os.listdir(path.parent) == ["rates.json"]


def test_paths_that_cannot_be_are_named(tmp_path, saved):
    save_sampler(tmp_path / "new" / "rates.json", saved[1])  # its folder is created
    with pytest.raises(UserError, match="cannot write .*new/rates.json"):
        save_sampler(tmp_path / "new" / "rates.json" / "rates.json", saved[1])
    with pytest.raises(UserError, match=r"cannot read .*absent.json \(No such file"):
        load_sampler(tmp_path / "absent.json")


def without(key):
    return lambda content: content.pop(key)


def put(key, value):
    return lambda content: content.__setitem__(key, value)


def scale(key, factor):
    return lambda content: content.__setitem__(key, [factor * x for x in content[key]])


def replace(key, index, value):
    return lambda content: content[key].__setitem__(index, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("format"), "'format' is not"),
        (put("format", "other"), "'format' is not"),
        (put("version", 2), "has version 2, this program reads 1"),
        (put("version", True), "has version True"),
        (without("version"), "has version None"),
        (without("density"), "lacks 'density'"),
        (without("moments"), "lacks 'moments'"),
        (without("lam"), "lacks 'lam'"),
        (put("lam", 0.0), "the share of the uniform, is 0.0"),
        (put("eps", 1.0), "the least masked fraction, is 1.0"),
        (put("kl", 10**400), "too large"),
        (put("target", "entropy"), "'target' is 'entropy'"),
        (put("parameters", 3), "has no attribute 'items'"),
        (put("density", "high"), "could not convert"),
        (put("density", None), "does not hold a density"),
        (scale("density", 1.001), r"integral is 1\.001, not 1"),
        (scale("density", -1), "not positive"),
        (replace("density", 3, float("nan")), "not finite"),
        (replace("density", 3, -1.0), "not positive"),
        (replace("density", 0, "x"), "does not hold a density"),
        (replace("edges", 3, 0.9), "do not increase"),
        (replace("edges", -1, 2.0), "do not increase"),
        (lambda content: content["density"].pop(), "one value for each"),
        (lambda content: content.update(edges=[0.0] * (TABLE_SIZE + 1)), "more than 1024 edges"),
        (replace("moments", 0, float("inf")), "rate moments hold a number"),
        (lambda content: content["moments"].pop(), "rate moments are 4 numbers"),
        (put("errors", [0.1]), "'errors' are not one number for each bin"),
        (put("errors", [-0.1] * 30), "'errors' are not one number for each bin"),
    ],
)
def test_damaged_files_are_named(saved, damage, message):
    path, _ = saved
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_sampler(path)
    text = str(caught.value)
    assert str(path) in text and "make it anew with tools/fit_ppots.py" in text and "\n" not in text


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "[1, 2]", "null", "[" * 100_000, b"\xff\xfe"]
)
def test_files_that_are_something_else_are_named(tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="rates.json is not a rate density") as caught:
        load_sampler(path)
    assert "make it anew with tools/fit_ppots.py" in str(caught.value)
