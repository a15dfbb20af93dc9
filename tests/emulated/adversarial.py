"""Rows that provoke rounding errors in a product, and the error bound of each output."""

from __future__ import annotations


def spoil(x, kind):
    """Adversarial rows of x, in place. Shapes: (T, K)."""
    if kind == "zeros":
        x[0] = 0
    elif kind == "outliers":
        x[:, ::17] *= 200
    elif kind == "one huge":
        x[0, 3] = 3e4
    elif kind == "subnormal":
        x[0] *= 1e-38
    return x


def assert_near(found, x, weight, residual=None, *, eps):
    """Each output within `eps` of its terms' magnitudes: a huge row must not hide an error in a small one."""
    expected, terms = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    if residual is not None:
        expected, terms = expected + residual.double(), terms + residual.double().abs()
    smallest = 2.0**-126 * (weight.abs().sum(1) + 1)  # numbers below it may be flushed to 0
    assert ((found.double() - expected).abs() <= eps * terms + smallest).all()
