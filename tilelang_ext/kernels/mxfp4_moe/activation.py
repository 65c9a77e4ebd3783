"""The activation between the two GEMMs of a mixture of experts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    """The function of gate g and up u between the two GEMMs.

    silu:              g * sigmoid(g) * u
    swiglu (gpt-oss):  g * sigmoid(alpha * g) * (u + 1) with g = min(g, limit), u = clamp(u, -limit, limit)
    """

    name: str = "swiglu"  # or "silu"
    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, g, u, sigmoid=None):
        """Return the expression for float32 g and u; a kernel for one target may pass a `sigmoid` of its own."""
        # Here, since an exported folder has the class and no language.
        from tilelang_ext.language.swiglu import sigmoid_of, silu_of, swiglu_of

        sigmoid = sigmoid_of if sigmoid is None else sigmoid
        return silu_of(g, u, sigmoid) if self.name == "silu" else swiglu_of(g, u, self.alpha, self.limit, sigmoid)
