"""VAT-HM: VAT with hybrid masking of the supports.

Moon et al., "HM: Hybrid Masking for Few-Shot Segmentation", ECCV 2022. Published program:
github.com/moonsh/HM-Hybrid-Masking-ECCV-2022 at f73e323, without a licence; it changes VAT's, see `vat.py`. This code
was written from descriptions of both.

Supports also pass through the backbone as images whose background is the mean colour. Each element of a support's
features is that of the masked features where it is positive, and else that of the masked image's features. VAT masks
features after it resizes them; here they are masked first. No parameter is added.
"""

from collections.abc import Mapping

from torch import Tensor

from pmnet.backbones import Features
from pmnet.methods import vat
from pmnet.methods.correlation import unit
from pmnet.methods.hybrid import hybrid, masked_pass
from pmnet.methods.vat import STAGES, VAT, VATHead


class VATHMHead(VATHead):
    """VAT's head, for supports that have a second pass, "layer3_masked" and so on, beside "layer3"."""

    def see(self, support_feats: Features, support_masks: Tensor) -> Features:
        """Unit vectors of the features after hybrid masking and resizing; arguments as in `Head.see`."""
        chosen = hybrid(support_feats, support_masks)
        return {m: [unit(self.fixed(f, m)) for f in chosen[m]] for m in STAGES}


class VATHM(VAT):
    """Takes any number of shots and any image sides. Training takes one shot.

    Args:
        backbone, appearance: see `VAT`.

    Example:
        >>> import torch
        >>> from pmnet.backbones import SmallBackbone
        >>> from pmnet.methods.vat_hm import VATHM
        >>> method = VATHM(SmallBackbone("none")).eval()
        >>> images, masks = torch.rand(1, 1, 3, 64, 64), torch.ones(1, 1, 64, 64)
        >>> with torch.no_grad():
        ...     method.predict(torch.rand(1, 3, 64, 64), images, masks).shape
        torch.Size([1, 64, 64])
    """

    head_class = VATHMHead
    title = "VAT-HM"

    def of_supports(self, support_feats: Features, support: Tensor, support_masks: Tensor) -> Features:
        whole = super().of_supports(support_feats, support, support_masks)
        return {**whole, **masked_pass(self, support, support_masks)}


def from_release(state_dict: Mapping[str, Tensor]) -> VATHead:
    """The head, in eval mode, from the authors' tensor names, which are VAT's: see `vat.from_release`."""
    return vat.from_release(state_dict, VATHMHead)
