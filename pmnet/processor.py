"""What the processor can do."""

import torch


def has_bfloat16() -> bool:
    """False where PyTorch has no fast kernels in bfloat16 for this processor: without AVX-512, for example.

    Example:
        >>> has_bfloat16() in (True, False)
        True
    """
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
