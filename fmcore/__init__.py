"""fmcore: a training engine for foundation models whose speed comes from its own kernels."""

__version__ = "0.1.0"
