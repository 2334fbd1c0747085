"""Queries and supports of different sizes: every method either takes them, or says that it does not."""

import pytest
import torch

from pmnet.backbones import SmallBackbone
from pmnet.errors import SettingError
from pmnet.methods import all_methods, vat
from pmnet.methods.pfenet import PFENet

SAME_SIZE = {"dcama"}  # as their cards say


@pytest.fixture(autouse=True)
def halved_vat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vat.VATHead, "sides", {layer: side // 2 for layer, side in vat.SIDES.items()})


@pytest.mark.parametrize("name", all_methods())
def test_result_has_the_querys_size_and_is_that_of_supports_seen_before(name: str) -> None:
    torch.manual_seed(0)
    kind = all_methods()[name]
    options = {"bins": [1.0, 0.5]} if issubclass(kind, PFENet) else {}
    options |= {"base_classes": 5} if name == "repri" else {}
    method = kind(SmallBackbone("none"), **options).eval()
    of_query, of_support = ((65, 97), (97, 65)) if 65 % kind.side_multiple == kind.side_offset else ((64, 96), (96, 64))
    query, support = torch.rand(1, 3, *of_query), torch.rand(1, 2, 3, *of_support)
    masks = torch.zeros(1, 2, *of_support)
    masks[..., 20:50, 20:40] = 1
    with torch.no_grad():
        if name in SAME_SIZE:
            with pytest.raises((SettingError, ValueError), match=r"siz|side"):
                method(query, support, masks)
            return
        logits, mask = method(query, support, masks), method.predict(query, support, masks)
        assert logits.shape == (1, 2, *of_query)
        assert mask.shape == (1, *of_query)
        seen = method.see(support, masks)
        torch.testing.assert_close(method.segment(query, seen), logits, rtol=1e-4, atol=1e-5)
        assert (method.mask(query, seen) == mask).float().mean() > 0.99  # votes may be a tie
