"""Every public operator. The file of each one holds its mathematics, its kernels and its gradient."""

from fmcore.kernels.adamw import adamw_ as adamw_
from fmcore.kernels.attention import attention as attention
from fmcore.kernels.cross_entropy import cross_entropy as cross_entropy
from fmcore.kernels.gelu import gelu as gelu
from fmcore.kernels.layer_norm import layer_norm as layer_norm
from fmcore.kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fmcore.kernels.linear_cross_entropy import linear_logprob as linear_logprob
from fmcore.kernels.rms_norm import rms_norm as rms_norm
from fmcore.kernels.rope import rope as rope
from fmcore.kernels.swiglu import swiglu as swiglu
