import warnings
from functools import wraps

from torch import Tensor, nn

from warpformer.nn._attention_inputs import require, shape_of
from warpformer.nn._drop_in import drop_in, drop_in_


@drop_in
class Transformer(nn.Transformer):
    """torch.nn.Transformer on our TransformerEncoder and TransformerDecoder.

    Constructor, parameters, initialization, state_dict and forward(src, tgt, masks) are torch's. To decode
    token by token, call its parts: `memory = model.encoder(src)`, then `model.decoder(tokens, memory,
    cache=cache)` with one cache of `model.decoder.make_cache()`.

    Source: torch.nn.Transformer; "Attention Is All You Need".
    """

    @wraps(nn.Transformer.__init__)
    def __init__(self, *args, **kwargs):
        with warnings.catch_warnings():  # why torch's encoder would be slow
            warnings.filterwarnings("ignore", "enable_nested_tensor")
            super().__init__(*args, **kwargs)
        for part, custom in ((self.encoder, "custom_encoder"), (self.decoder, "custom_decoder")):
            if part is not kwargs.get(custom):
                drop_in_(part)

    @wraps(nn.Transformer.forward)
    def forward(self, src: Tensor, tgt: Tensor, *args, **kwargs) -> Tensor:
        shapes = f"src = {shape_of(src)}, tgt = {shape_of(tgt)}"
        require(src.ndim == tgt.ndim and src.ndim in (2, 3), f"src and tgt are not both 2-D or 3-D: {shapes}")
        batch = 0 if self.batch_first else 1
        require(src.ndim == 2 or src.shape[batch] == tgt.shape[batch], f"the batches differ: {shapes}")
        require(
            src.shape[-1] == tgt.shape[-1] == self.d_model,
            f"the last dimension is not d_model = {self.d_model}: {shapes}",
        )
        return super().forward(src, tgt, *args, **kwargs)
