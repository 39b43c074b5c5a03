"""Every public operator. The file of each one holds its mathematics, its kernels and its gradient."""

from fmcore import op as _op
from fmcore.kernels.activation import gelu as gelu
from fmcore.kernels.activation import quick_gelu as quick_gelu
from fmcore.kernels.activation import relu_squared as relu_squared
from fmcore.kernels.adamw import adamw_ as adamw_
from fmcore.kernels.attention import attention as attention
from fmcore.kernels.cross_entropy import cross_entropy as cross_entropy
from fmcore.kernels.decode_attention import decode_attention as decode_attention
from fmcore.kernels.dropout import dropout as dropout
from fmcore.kernels.embedding import embedding as embedding
from fmcore.kernels.glu import geglu as geglu
from fmcore.kernels.glu import reglu as reglu
from fmcore.kernels.glu import swiglu as swiglu
from fmcore.kernels.layer_norm import layer_norm as layer_norm
from fmcore.kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fmcore.kernels.linear_cross_entropy import linear_logprob as linear_logprob
from fmcore.kernels.lion import lion_ as lion_
from fmcore.kernels.muon import muon_ as muon_
from fmcore.kernels.rms_norm import rms_norm as rms_norm
from fmcore.kernels.rope import rope as rope

_op.check_environment()
